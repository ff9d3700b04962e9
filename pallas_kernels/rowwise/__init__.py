"""What happens to each token's row between the products: norms, the gate of an MLP, rotated heads.

The problem: these passes do little arithmetic, and XLA on a CPU makes several of each, in float32, one number at a time
where there are exponentials: a third of the time of a 512-token chunk. Data flow: rows in, rows out, in the
activations' dtype; float32 between, rounded where the checkpoints' own code rounds. Training writes them with `xla`'s
functions, which can be differentiated.
"""

from pallas_kernels.rowwise.api import OP, add_norm, gate, heads, norm, turns
from pallas_kernels.rowwise.problem import ACTIVATIONS, Heads, RowwiseProblem
from pallas_kernels.rowwise.xla import rotate

__all__ = ["ACTIVATIONS", "OP", "Heads", "RowwiseProblem", "add_norm", "gate", "heads", "norm", "rotate", "turns"]
