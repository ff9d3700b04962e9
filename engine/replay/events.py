"""The lines of a recording: JSON, one object each, with its kind under "event".

    header, then for each step   forward ─▶ sample ─▶ collect   and, now and then, request, failed, reset

With steps planned ahead the `collect` of one comes after the `forward` of the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import ConfigError

VERSION = 1


class Header(msgspec.Struct, tag="header", tag_field="event"):
    """The first line.

    Attributes:
        version: of the format.
        settings: flat, as `EngineConfig.from_flat` takes them; what depends on the machine is spelled out.
        device: "platform:kind" that it was recorded on.
        versions: of jax and its like.
    """

    version: int
    settings: dict[str, Any]
    device: str
    versions: dict[str, str]


class NewSequence(msgspec.Struct, tag="request", tag_field="event"):
    """A sequence that a step holds for the first time.

    Attributes:
        number: what later lines call it.
        request: plain values (`engine.remote.plain`), without its text.
        index: which of its n completions.
    """

    number: int
    request: dict[str, Any]
    index: int


class Item(msgspec.Struct, array_like=True):
    """A `ScheduledSequence`, and what changed of its sequence since its last.

    Attributes:
        number: of the sequence.
        row, start, num_tokens, samples, first_new_block, starts_row, drafts, is_relative: see `ScheduledSequence`.
        blocks: of the block table from `first_new_block` on.
        outputs: tokens that the host has read since.
        num_preemptions: of the sequence.
    """

    number: int
    row: int
    start: int
    num_tokens: int
    samples: bool
    first_new_block: int
    starts_row: bool
    drafts: tuple[int, ...]
    is_relative: bool
    blocks: list[int]
    outputs: list[int]
    num_preemptions: int


class Forward(msgspec.Struct, tag="forward", tag_field="event"):
    """The forward pass of a step was dispatched.

    Attributes:
        bucket: fields of the `Bucket` that it ran in, which decides the order of sums; empty if dispatching it failed.
    """

    step: int
    items: list[Item]
    bucket: tuple[int, ...] = ()


class Sample(msgspec.Struct, tag="sample", tag_field="event"):
    """Its sampling was.

    Attributes:
        mask: int32[S * L, W] as zlib's bytes, if a sequence follows a grammar.
        shape: of the mask.
    """

    step: int
    mask: bytes | None = None
    shape: tuple[int, ...] = ()


class Collect(msgspec.Struct, tag="collect", tag_field="event"):
    """What a step gave.

    Attributes:
        tokens: per item; arbitrary where it does not sample, and then empty here.
        digests: name -> of the bits of the other results that there are: log-probabilities, scores of prompts, sums.
    """

    step: int
    tokens: list[list[int]]
    digests: dict[str, str]


class Failed(msgspec.Struct, tag="failed", tag_field="event"):
    """A step raised. Attributes: stage: "forward", "sample" or "collect"."""

    step: int
    stage: str
    error: str


class Reset(msgspec.Struct, tag="reset", tag_field="event"):
    """The device state was made anew; steps in flight are void."""


Event = NewSequence | Forward | Sample | Collect | Failed | Reset


def read_recording(path: Path) -> tuple[Header, Iterator[Event]]:
    """The header, and the lines behind it as they are asked for. A last line that was cut short is left out.

    Raises:
        ConfigError: the file cannot be read, or is no recording, or one of another version. Of lines behind the header,
            when they are asked for.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"The recording {path} cannot be read: {error.strerror or error}.") from error
    try:
        header = msgspec.json.decode(file.readline(), type=Header)
    except msgspec.DecodeError as error:
        file.close()
        raise ConfigError(f"{path} is not a recording that record=FILE made: {error}.") from error
    if header.version != VERSION:
        file.close()
        raise ConfigError(f"{path} is a recording of version {header.version}; this Quire reads version {VERSION}.")
    return header, _events(path, file)


def count_events(path: Path) -> int:
    """Lines behind the header."""
    with path.open("rb") as file:
        return sum(1 for _ in file) - 1


def _events(path: Path, file: Any) -> Iterator[Event]:
    decoder = msgspec.json.Decoder(Event)
    with file:
        for number, line in enumerate(file, 2):
            if not line.endswith(b"\n"):
                return  # written when the process ended
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}, line {number}: {error}.") from error
