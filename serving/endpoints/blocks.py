"""`Blocks`: the deltas of an answer as blocks that begin, grow and end. What APIs with typed content are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from serving.parsing.deltas import ContentDelta, Delta, ReasoningDelta

BlockKind = Literal["reasoning", "text", "call"]


@dataclass
class Block:
    """One block. `text` is the text, the reasoning, or the JSON text of a call's arguments; `id` and `name` are a
    call's.
    """

    index: int
    kind: BlockKind
    text: str = ""
    id: str = ""
    name: str = ""


@dataclass(frozen=True)
class BlockEvent:
    """What happens to a block: "start", "delta" (`text` is what is new) or "end"."""

    what: Literal["start", "delta", "end"]
    block: Block
    text: str = ""


class Blocks:
    """Turns deltas into blocks. At most one is open: another kind, or another call, ends it.

    Attributes:
        blocks: all so far, in order.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None
        self._call: int | None = None  # which call is open

    @property
    def has_calls(self) -> bool:
        """True if there is a call among them."""
        return any(block.kind == "call" for block in self.blocks)

    def feed(self, deltas: Iterable[Delta]) -> list[BlockEvent]:
        """What the next deltas do."""
        events: list[BlockEvent] = []
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self._grow(events, "text", delta.text)
            elif isinstance(delta, ReasoningDelta):
                self._grow(events, "reasoning", delta.text)
            else:
                if self._open is None or self._open.kind != "call" or self._call != delta.index:
                    self._begin(events, Block(len(self.blocks), "call", id=delta.id or "", name=delta.name or ""))
                    self._call = delta.index
                self._add(events, delta.arguments)
        return events

    def finish(self) -> list[BlockEvent]:
        """The answer is over."""
        events: list[BlockEvent] = []
        self._end(events)
        return events

    def _grow(self, events: list[BlockEvent], kind: BlockKind, text: str) -> None:
        if not text:
            return
        if self._open is None or self._open.kind != kind:
            self._begin(events, Block(len(self.blocks), kind))
        self._add(events, text)

    def _begin(self, events: list[BlockEvent], block: Block) -> None:
        self._end(events)
        self._open = block
        self.blocks.append(block)
        events.append(BlockEvent("start", block))

    def _add(self, events: list[BlockEvent], text: str) -> None:
        assert self._open is not None
        if text:
            self._open.text += text
            events.append(BlockEvent("delta", self._open, text))

    def _end(self, events: list[BlockEvent]) -> None:
        if self._open is not None:
            events.append(BlockEvent("end", self._open))
            self._open = None
