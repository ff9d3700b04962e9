"""Markers in text that comes in pieces: finding one anywhere, expecting one here."""

from __future__ import annotations


class MarkerFinder:
    """Finds a marker in a stream, holding back only what may be its beginning.

    Args:
        marker: its first character must not occur in it again; so a failed match can only begin anew, never overlap.
    """

    def __init__(self, marker: str) -> None:
        if marker[0] in marker[1:]:
            raise ValueError(f"the first character of {marker!r} must be unique in it")
        self.marker = marker
        self._held = ""

    def find(self, text: str, start: int) -> tuple[str, bool, int]:
        """Go on from `text[start]`.

        Returns:
            (text before the marker or that cannot belong to it, whether the marker was found, where to go on).
        """
        before = ""
        if self._held:
            candidate = self._held + text[start : start + len(self.marker) - len(self._held)]
            if self.marker.startswith(candidate):
                start += len(candidate) - len(self._held)
                found = candidate == self.marker
                self._held = "" if found else candidate
                return "", found, start
            before, self._held = self._held, ""
        index = text.find(self.marker, start)
        if index >= 0:
            return before + text[start:index], True, index + len(self.marker)
        tail = text.rfind(self.marker[0], max(start, len(text) - len(self.marker) + 1))
        if tail >= 0 and self.marker.startswith(text[tail:]):
            self._held = text[tail:]
            return before + text[start:tail], False, len(text)
        return before + text[start:], False, len(text)

    def release(self) -> str:
        """The text is over: what was held back."""
        held, self._held = self._held, ""
        return held


class Expected:
    """A marker that must come right here.

    Attributes:
        seen: how much of it has come.
    """

    def __init__(self, marker: str) -> None:
        self.marker = marker
        self.seen = ""

    def match(self, text: str, start: int) -> tuple[int, bool | None]:
        """Go on from `text[start]`.

        Returns:
            (where to go on, True if the marker is complete, False if it does not come, None if the text is used up).
        """
        position = start
        while len(self.seen) < len(self.marker):
            if position == len(text):
                return position, None
            if text[position] != self.marker[len(self.seen)]:
                return position, False
            self.seen += text[position]
            position += 1
        return position, True
