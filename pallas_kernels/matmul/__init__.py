"""Matrix products of activations with weights, as `[in, out]` or `[out, in]`."""

from pallas_kernels.matmul.api import OP, MatmulProblem, matmul

__all__ = ["OP", "MatmulProblem", "matmul"]
