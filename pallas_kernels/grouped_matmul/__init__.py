"""Products of rows sorted by expert with each expert's own weights, dense or packed: the experts of a MoE layer.

Choosing experts, sorting rows and adding an expert's share to a token are the layer's business, not this op's.
"""

from pallas_kernels.grouped_matmul.api import OP, grouped_matmul
from pallas_kernels.grouped_matmul.problem import GroupedMatmulProblem

__all__ = ["OP", "GroupedMatmulProblem", "grouped_matmul"]
