"""The text of a compiled program: what each instruction does and where in our source it comes from.

XLA keeps, for every instruction, the Python stack that traced it (`stack_frame_id`, with tables of files and functions
at the head of the text). That survives optimisation: a fusion carries the stack of its root. So instructions are
sorted by our own files and functions, and no annotation is needed in the models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

CONTROL = frozenset({"while", "call", "conditional"})  # these run others; their own time is bookkeeping

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r"\s*(?P<opcode>[a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply)=%?(?P<name>[\w.\-]+)")
_BODIES = re.compile(r"(?:body|condition)=%?([\w.\-]+)")
_FRAME_ID = re.compile(r"stack_frame_id=(\d+)")
_TABLE_TEXT = re.compile(r'^(\d+) "(.*)"$')
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) ")
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")


@dataclass(frozen=True)
class Frame:
    """One function of a Python stack."""

    file: str
    function: str


@dataclass(frozen=True)
class Instruction:
    """One instruction of a program.

    Attributes:
        name: unique within the program; traces use it.
        opcode: "fusion", "dot", "while" …
        inside: opcodes of everything it contains, fused instructions included.
        frames: the Python stack, innermost first. XLA makes instructions without one: then that of what they
            contain, or of the loop that they are in.
    """

    name: str
    opcode: str
    inside: frozenset[str]
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class _Parsed:
    """An instruction as it stands in the text: `called` is part of it (a fusion), `bodies` are run by it (a loop)."""

    name: str
    opcode: str
    called: str | None
    bodies: tuple[str, ...]
    frame_id: int


@dataclass
class _Tables:
    """The tables at the head of the text; ids start at 1."""

    files: dict[int, str] = field(default_factory=dict)
    functions: dict[int, str] = field(default_factory=dict)
    locations: dict[int, Frame] = field(default_factory=dict)
    frames: dict[int, tuple[int, int]] = field(default_factory=dict)  # id -> (location, parent or 0)

    def stack(self, frame_id: int) -> tuple[Frame, ...]:
        """Innermost first."""
        found: list[Frame] = []
        while frame_id in self.frames:
            location, frame_id = self.frames[frame_id]
            found.append(self.locations[location])
        return tuple(found)


def parse(text: str) -> dict[str, Instruction]:
    """All instructions of a program by name, from `compiled.as_text()`."""
    program = _Program(_Tables(), {})
    section, current = "", list[_Parsed]()
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            section = line
        elif section and line and not _table_line(program.tables, section, line):
            section = ""
        match = _COMPUTATION.match(line)
        if match:
            section, current = "", program.computations.setdefault(match["name"], [])
            continue
        match = _INSTRUCTION.match(line)
        if match:
            current.append(_instruction(match["name"], match["rest"]))
    return {
        parsed.name: program.resolve(parsed, computation)
        for computation, instructions in program.computations.items()
        for parsed in instructions
    }


def _table_line(tables: _Tables, section: str, line: str) -> bool:
    """Add one row of a table; False if the line is none."""
    if section in ("FileNames", "FunctionNames"):
        match = _TABLE_TEXT.match(line)
        if match:
            table = tables.files if section == "FileNames" else tables.functions
            table[int(match[1])] = match[2]
    elif section == "FileLocations":
        match = _LOCATION.match(line)
        if match:
            tables.locations[int(match[1])] = Frame(tables.files[int(match[2])], tables.functions[int(match[3])])
    else:
        match = _FRAME.match(line)
        if match:
            # Printed one too high: 1 is no parent, 2 is frame 1.
            tables.frames[int(match[1])] = int(match[2]), int(match[3] or 1) - 1
    return match is not None


def _instruction(name: str, rest: str) -> _Parsed:
    """`f32[8]{0} fusion(%a), calls=%c, metadata={…}`; the shape of a tuple is in brackets and may hold blanks."""
    position = _after_brackets(rest) if rest.startswith("(") else rest.index(" ")
    match = _OPCODE.match(rest, position)
    called, frame = _CALLED.search(rest), _FRAME_ID.search(rest)
    return _Parsed(
        name=name,
        opcode=match["opcode"] if match else "",
        called=called["name"] if called else None,
        bodies=tuple(_BODIES.findall(rest)),
        frame_id=int(frame[1]) if frame else 0,
    )


def _after_brackets(text: str) -> int:
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position + 1
    return len(text)


@dataclass
class _Program:
    """All computations by name, and the tables."""

    tables: _Tables
    computations: dict[str, list[_Parsed]]

    @cached_property
    def loops(self) -> dict[str, tuple[_Parsed, str]]:
        """Computation -> the instruction that runs it, and the computation which that is in."""
        return {
            body: (parsed, computation)
            for computation, instructions in self.computations.items()
            for parsed in instructions
            for body in parsed.bodies
        }

    def resolve(self, parsed: _Parsed, computation: str) -> Instruction:
        """The instruction with everything that is known of it."""
        opcodes = frozenset(other.opcode for other in self._inside(parsed))
        return Instruction(parsed.name, parsed.opcode, opcodes, self._stack(parsed, computation))

    def _inside(self, parsed: _Parsed) -> Iterator[_Parsed]:
        """The instruction itself and, for fusions and calls, all that they contain."""
        yield parsed
        for other in self.computations.get(parsed.called or "", ()):
            yield from self._inside(other)

    def _stack(self, parsed: _Parsed, computation: str) -> tuple[Frame, ...]:
        # XLA leaves the place of a call on what it made itself; what is inside knows better.
        stacks = Counter(
            self.tables.stack(other.frame_id) for other in self._inside(parsed) if other.opcode != "parameter"
        )
        deepest = max(stacks, key=lambda frames: (len(frames), stacks[frames]), default=())
        if not deepest and computation in self.loops:
            return self._stack(*self.loops[computation])
        return deepest
