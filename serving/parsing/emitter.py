"""`Emitter`: collects what a parser finds as deltas, numbers the calls, and trims the whitespace around them."""

from __future__ import annotations

from collections.abc import Callable

from serving.parsing.deltas import ContentDelta, Delta, ToolCallDelta

NewId = Callable[[], str]


class Emitter:
    """Collects the deltas of one answer.

    Whitespace before a call, between calls and after the last one separates them and is left out; only content on both
    sides of a call stays apart by it.

    Args:
        new_id: makes the id of a call.
        most_calls: calls after this many are left out; None = all are kept.
    """

    def __init__(self, new_id: NewId, most_calls: int | None = None) -> None:
        self._new_id = new_id
        self._most_calls = most_calls
        self.num_calls = 0
        self._spaces: list[str] = []  # held back until it is known what they lead to
        self._has_content = False
        self._deltas: list[Delta] = []
        self._texts: list[str] = []  # of the delta that is being collected
        self._collecting: type[ContentDelta] | type[ToolCallDelta] | None = None
        self._header: tuple[str, str] | None = None  # id and name, not yet told

    def content(self, text: str) -> None:
        """More of the visible answer."""
        stripped = text.rstrip()
        if not stripped:
            if text:
                self._spaces.append(text)
            return
        spaces, self._spaces = self._spaces, [text[len(stripped) :]]
        if self.num_calls and not self._has_content:
            spaces, stripped = [], stripped.lstrip()
        self._has_content = True
        self._collect(ContentDelta)
        self._texts += [*spaces, stripped]

    def begin_call(self, name: str, call_id: str | None = None) -> None:
        """A call begins; its arguments follow."""
        self._flush()
        self._spaces = []
        self._collecting = ToolCallDelta
        self._header = (call_id or self._new_id(), name)
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the JSON text of the arguments of the call that began last."""
        if text:
            self._collect(ToolCallDelta)
            self._texts.append(text)

    def take(self) -> list[Delta]:
        """What was found since the last time."""
        self._flush()
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> list[Delta]:
        """The answer is over: what was found since the last time, whitespace at the very end included."""
        if self._spaces and not self.num_calls:
            self._collect(ContentDelta)
            self._texts += self._spaces
        self._spaces = []
        return self.take()

    def _collect(self, kind: type[ContentDelta] | type[ToolCallDelta]) -> None:
        if self._collecting is not kind:
            self._flush()
            self._collecting = kind

    def _flush(self) -> None:
        text = "".join(self._texts)
        self._texts = []
        if self._collecting is ContentDelta and text:
            self._deltas.append(ContentDelta(text))
        elif self._collecting is ToolCallDelta and (text or self._header):
            call_id, name = self._header or (None, None)
            self._header = None
            if self._most_calls is None or self.num_calls <= self._most_calls:
                self._deltas.append(ToolCallDelta(self.num_calls - 1, call_id, name, text))
        self._collecting = None
