"""Matrix products of activations with weights, as `[in, out]` or `[out, in]`."""

from pallas_kernels.matmul.api import OP, matmul
from pallas_kernels.matmul.problem import MatmulProblem

__all__ = ["OP", "MatmulProblem", "matmul"]
