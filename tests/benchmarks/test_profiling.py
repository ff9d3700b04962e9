"""Reading programs and traces, on a small program of real XLA and on intervals made by hand."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.profiling.attribution import Interval, Step, mean_step, share_out, undisturbed_steps
from benchmarks.profiling.categories import LOOPS, OTHER, SAMPLING, UNKNOWN, WAITING, category, order
from benchmarks.profiling.hlo import Frame, Instruction, parse
from benchmarks.profiling.trace import Event, options, read


def _weights_times(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def _shape_up(x: jax.Array) -> jax.Array:
    return jnp.exp(x) / jnp.exp(x).sum()


def _loop(x: jax.Array, w: jax.Array, n: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, n, lambda _, x: _shape_up(_weights_times(x, w)), x)


@pytest.fixture(scope="module")
def program() -> jax.stages.Compiled:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 256), (256, 256))]
    return jax.jit(_loop).lower(*shapes, jax.ShapeDtypeStruct((), jnp.int32)).compile()


def _functions(instruction: Instruction) -> list[str]:
    return [frame.function for frame in instruction.frames]


def test_instructions_know_their_functions(program: jax.stages.Compiled) -> None:
    instructions = parse(program.as_text())
    dots = [i for i in instructions.values() if "dot" in i.inside and i.opcode != "while"]
    assert dots and all(_functions(i)[0] == "_weights_times" for i in dots)
    assert all(i.frames[0].file.endswith("test_profiling.py") for i in dots)
    exponentials = [i for i in instructions.values() if i.opcode == "fusion" and "exponential" in i.inside]
    assert exponentials and all("_shape_up" in _functions(i) for i in exponentials)


def test_a_loop_does_not_hold_what_it_runs(program: jax.stages.Compiled) -> None:
    loops = [i for i in parse(program.as_text()).values() if i.opcode == "while"]
    assert len(loops) == 1 and loops[0].inside == {"while"}


def test_what_has_no_function_takes_that_of_its_loop(program: jax.stages.Compiled) -> None:
    lines = program.as_text().splitlines()
    text = "\n".join(re.sub(r" stack_frame_id=\d+", "", line) if "dot_general" in line else line for line in lines)
    dots = [i for i in parse(text).values() if i.opcode == "fusion" and "dot" in i.inside]
    assert dots and all(_functions(i)[0] == "_loop" for i in dots)


def test_frames_lead_outwards(program: jax.stages.Compiled) -> None:
    dot = next(i for i in parse(program.as_text()).values() if i.opcode == "dot")
    functions = _functions(dot)
    assert functions.index("_weights_times") < functions.index("_loop")


def test_every_traced_instruction_is_in_the_program(program: jax.stages.Compiled, tmp_path: Path) -> None:
    x, w, n = jnp.ones((64, 256)), jnp.ones((256, 256)), jnp.int32(5)
    program(x, w, n).block_until_ready()
    with jax.profiler.trace(tmp_path, profiler_options=options()):
        for _ in range(3):
            program(x, w, n).block_until_ready()
    events = [event for event in read(tmp_path) if event.module == "jit__loop"]
    instructions = parse(program.as_text())
    assert {event.name for event in events} <= set(instructions)
    loops = [event for event in events if instructions[event.name].opcode == "while"]
    dots = [event for event in events if "dot" in instructions[event.name].inside]
    assert len({event.run for event in events}) == len(loops) == 3 and len(dots) == 15
    assert all(any(loop.start_ns <= dot.start_ns and dot.stop_ns <= loop.stop_ns for loop in loops) for dot in dots)


def test_no_trace_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="was a trace taken"):
        read(tmp_path)


def _at(place: str, *inside: str, opcode: str = "fusion") -> Instruction:
    file, _, function = place.partition(":")
    return Instruction("i", opcode, frozenset({opcode, *inside}), (Frame(file, function),))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (_at("pallas_kernels/paged_attention/xla.py:one_chunk", "dot", "gather"), "attention: dots"),
        (_at("pallas_kernels/paged_attention/xla.py:_gather", "gather", "convert"), "attention: page gather"),
        (_at("pallas_kernels/paged_attention/xla.py:_online", "exponential"), "attention: softmax"),
        (_at("pallas_kernels/paged_attention/xla.py:plan", "sort"), "attention: rest"),
        (_at("pallas_kernels/kv_write/xla.py:run", "scatter"), "KV write"),
        (_at("models/decoder.py:Decoder.logits", "dot"), "dots: head"),
        (_at("models/layers/basic.py:GatedMlp.__call__", "dot"), "dots: MLP"),
        (_at("models/layers/attention.py:Attention.__call__", "dot"), "dots: attention projections"),
        (_at("models/layers/basic.py:RMSNorm.__call__", "reduce"), "norms, rope, activation, residual"),
        (_at("models/layers/rope.py:rotate", "multiply"), "norms, rope, activation, residual"),
        (_at(":", opcode="copy"), "copies"),
        (_at("models/decoder.py:Decoder.__call__", "gather"), "embedding, unpacking, head's rest"),
        (_at("pallas_kernels/paged_attention/xla.py:run", opcode="while"), LOOPS),
        (_at("elsewhere.py:f", "add"), OTHER),
    ],
)
def test_categories(instruction: Instruction, expected: str) -> None:
    assert category("jit_forward", "i", {"i": instruction}) == expected
    assert expected in order()


def test_categories_of_other_programs() -> None:
    assert category("jit_sample_step", "i", {}) == SAMPLING
    assert category("jit_update_tables", "i", {}) == OTHER
    assert category("jit_forward", "i", {}) == UNKNOWN


def test_parallel_instructions_share_the_moment() -> None:
    shares = share_out([Interval("a", 0, 10), Interval("b", 4, 8), Interval("b", 6, 8)], 0, 12)
    # a alone 0-4, a and b 4-6, a and twice b 6-8, a alone 8-10, nothing 10-12.
    assert shares == pytest.approx({"a": 4 + 1 + 2 / 3 + 2, "b": 1 + 4 / 3, WAITING: 2})


def test_loops_count_where_nothing_inside_them_runs() -> None:
    shares = share_out([Interval(LOOPS, 0, 10), Interval("a", 2, 6)], 0, 10)
    assert shares == pytest.approx({LOOPS: 6, "a": 4})


def test_what_is_outside_the_window_does_not_count() -> None:
    assert share_out([Interval("a", -5, 3), Interval("b", 9, 20), Interval("c", 30, 40)], 0, 10) == pytest.approx(
        {"a": 3, "b": 1, WAITING: 6}
    )


_INTERVALS = st.builds(
    lambda name, start, length: Interval(name, start, start + length),
    st.sampled_from(["a", "b", LOOPS]),
    st.integers(-20, 120),
    st.integers(0, 50),
)


@given(st.lists(_INTERVALS, max_size=30))
def test_shares_add_up_to_the_window(intervals: list[Interval]) -> None:
    shares = share_out(intervals, 0, 100)
    assert sum(shares.values()) == pytest.approx(100)
    assert all(value >= 0 for value in shares.values())


def _forward(run: int, start: float) -> list[Event]:
    return [Event("x", "jit_forward", run, start, start + 5), Event("y", "jit_forward", run, start + 5, start + 9)]


def test_the_first_step_and_the_extremes_do_not_count() -> None:
    starts = (0, 10, 22, 30, 1030, 1041)  # lengths 10 (cut off by the trace), 12, 8, 1000, 11
    events = [event for run, start in enumerate(starts) for event in _forward(run, start)]
    events.append(Event("s", "jit_sample_step", 99, 3, 4))
    steps = undisturbed_steps(events)
    assert [(step.start_ns, step.stop_ns) for step in steps] == [(1030, 1041), (10, 22)]
    with pytest.raises(ValueError, match="2 forward passes"):
        undisturbed_steps(events[:4])


def test_an_average_step_adds_up() -> None:
    intervals = [Interval("a", 0, 5), Interval("b", 10, 14), Interval("a", 12, 30)]
    shares = mean_step(intervals, [Step(0, 10), Step(10, 20)])
    assert shares == pytest.approx({"a": (5 + 1 + 6) / 2, "b": 3 / 2, WAITING: 5 / 2})
    assert sum(shares.values()) == pytest.approx(10)
