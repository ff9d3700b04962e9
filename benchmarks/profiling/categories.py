"""What an instruction is for: the first rule that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.profiling.hlo import CONTROL, Instruction

SAMPLING, LOOPS, OTHER, UNKNOWN, WAITING = "sampling", "loop bookkeeping", "other", "unknown", "waiting"
FORWARD_MODULE, SAMPLE_MODULE = "jit_forward", "jit_sample_step"


@dataclass(frozen=True)
class Rule:
    """A category, and where its instructions come from.

    Attributes:
        category: name in the table.
        place: part of "file:function" of a frame of the instruction's stack; "" = anywhere.
        opcodes: it holds at least one of these; empty = whatever it does.
    """

    category: str
    place: str
    opcodes: frozenset[str] = frozenset()

    def fits(self, instruction: Instruction) -> bool:
        """True if the instruction belongs here."""
        if self.opcodes and not self.opcodes & instruction.inside:
            return False
        return not self.place or any(self.place in f"{frame.file}:{frame.function}" for frame in instruction.frames)


_DOT = frozenset({"dot", "convolution", "custom-call"})
_SOFTMAX = frozenset({"exponential", "reduce", "divide"})
_COPY = frozenset({"copy", "copy-start", "copy-done"})

RULES = (
    Rule("attention: dots", "pallas_kernels/paged_attention/", _DOT),
    Rule("attention: page gather", "pallas_kernels/paged_attention/", frozenset({"gather"})),
    Rule("attention: softmax", "pallas_kernels/paged_attention/", _SOFTMAX),
    Rule("attention: rest", "pallas_kernels/paged_attention/"),
    Rule("KV write", "pallas_kernels/kv_write/"),
    Rule("dots: head", ":Decoder.logits", _DOT),
    Rule("dots: MLP", ":GatedMlp", _DOT),
    Rule("dots: attention projections", ":Attention.", _DOT),
    Rule("norms, rope, activation, residual", "models/layers/"),
    Rule("norms, rope, activation, residual", ":Block."),
    Rule("copies", "", _COPY),
    Rule("embedding, unpacking, head's rest", "models/decoder.py"),
    Rule("embedding, unpacking, head's rest", "engine/runtime/"),
)


def category(module: str, name: str, program: Mapping[str, Instruction]) -> str:
    """The category of one event of a trace.

    Args:
        module: name of its program, "jit_forward" for a step's forward pass.
        name: of the instruction.
        program: the forward pass's instructions.
    """
    if module == SAMPLE_MODULE:
        return SAMPLING
    if module != FORWARD_MODULE:
        return OTHER
    if name not in program:
        return UNKNOWN
    instruction = program[name]
    if instruction.opcode in CONTROL:
        return LOOPS
    return next((rule.category for rule in RULES if rule.fits(instruction)), OTHER)


def order() -> list[str]:
    """All categories as a table shows them."""
    return [*dict.fromkeys(rule.category for rule in RULES), SAMPLING, LOOPS, OTHER, UNKNOWN, WAITING]
