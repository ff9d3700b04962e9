"""Native kernels on a CPU: how the library comes to be, and what the product promises beyond the suite of all products
(`test_quantized_matmul.py` has that suite).
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native import library
from pallas_kernels.native.library import BuildError, Settings, load
from pallas_kernels.op import UnsupportedImplementationError
from pallas_kernels.quantized_matmul import KINDS, OP, from_dense, native_cpu, quantize_activations, quantized_matmul
from pallas_kernels.quantized_matmul.cases import Case
from pallas_kernels.quantized_matmul.weight import QuantizedWeight

ROOT = Path(__file__).resolve().parents[2]
NATIVE_KINDS = [kind for kind in KINDS if kind != "w8a8"]
call = jax.jit(quantized_matmul, static_argnames=("out_dtype", "implementation"))

needs_compiler = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))
needs_integers = pytest.mark.skipif(
    library.unavailable() is not None or not library.has_integer_dots(), reason="no dots of integers"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled library."""
    folder = tmp_path_factory.mktemp("made")
    load(Settings(folder))
    return next(folder.glob("*.so"))


@pytest.fixture
def compiler(made: Path, tmp_path: Path) -> Path:
    """A compiler that hands out what was compiled before, and notes each call beside itself."""
    path = tmp_path / "compiler"
    path.write_text(
        f"""#!/bin/sh
case "$*" in *-dM*) echo '#define A 1'; exit 0;; esac
echo called >> '{tmp_path}/calls'
while [ "$1" != -o ]; do shift; done
cp '{made}' "$2"
"""
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if nothing had been configured or loaded; afterwards as before."""
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(library, "_settings", Settings())
    monkeypatch.setattr(OP, "chosen", {})
    yield


def calls(compiler: Path) -> int:
    path = compiler.parent / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


@needs_compiler
def test_a_library_is_compiled_once(compiler: Path, tmp_path: Path) -> None:
    for _ in range(2):
        load(Settings(tmp_path / "cache", str(compiler)))
        assert calls(compiler) == 1
    load(Settings(tmp_path / "cache", str(compiler), machine="-march=other"))  # another key
    assert calls(compiler) == 2
    load(Settings(None, str(compiler)))
    load(Settings(None, str(compiler)))  # nowhere to keep it
    assert calls(compiler) == 4


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "changed", "no digest"])
def test_a_damaged_library_is_compiled_anew(
    damage: str, compiler: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(tmp_path / "cache", str(compiler))
    load(settings)
    (path,) = settings.cache_dir.glob("*.so")  # type: ignore[union-attr]
    content = path.read_bytes()
    path.unlink()  # the process has the old file's pages mapped
    if damage == "no digest":
        path.write_bytes(content)
        path.with_suffix(".sha256").unlink()
    else:
        path.write_bytes(content[:5000] if damage == "cut" else b"x" + content[1:])
    with caplog.at_level(logging.WARNING):
        found = load(settings)
    assert found.quire_dots_of_bfloat16() in (0, 1)
    assert "compiling it anew" in caplog.text
    assert calls(compiler) == 2 and path.read_bytes() == content
    load(settings)
    assert calls(compiler) == 2


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_a_warning(
    compiler: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        load(Settings(tmp_path / "file" / "cache", str(compiler)))
    assert "cannot be kept" in caplog.text


def test_without_a_compiler_the_ladder_says_so_and_takes_xla(
    fresh: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight, x = from_dense(jnp.ones((64, 32)), "w4a16", 32), jnp.ones((2, 64))
    library.configure(tmp_path, "/nowhere/c++")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_allclose(quantized_matmul(x, weight), 64.0, rtol=1e-6)
    reason = "no C++ compiler (/nowhere/c++) is installed"
    assert OP.chosen["quantized_matmul"].startswith("xla (") and reason in OP.chosen["quantized_matmul"]
    assert caplog.text.count(reason) == 1
    with pytest.raises(UnsupportedImplementationError, match="/nowhere/c"):
        quantized_matmul(x, weight, implementation="native_cpu")


def test_an_empty_name_switches_native_kernels_off(fresh: None) -> None:
    library.configure(None, "")
    weight = from_dense(jnp.ones((64, 32)), "w4a16", 32)
    with pytest.raises(UnsupportedImplementationError, match="no C\\+\\+ compiler is configured"):
        quantized_matmul(jnp.ones((2, 64)), weight, implementation="native_cpu")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "compiler"
    path.write_text("#!/bin/sh\necho 'unknown processor' >&2\nexit 3\n")
    path.chmod(0o755)
    with pytest.raises(BuildError, match="exit status 3: unknown processor"):
        load(Settings(tmp_path, str(path)))
    path.write_text("not a program")
    with pytest.raises(BuildError, match="cannot be run"):
        load(Settings(None, str(path)))


@needs_compiler
def test_what_a_compiler_made_must_load(compiler: Path, made: Path, tmp_path: Path) -> None:
    script = compiler.read_text().replace(f"cp '{made}' \"$2\"", 'echo text > "$2"')
    compiler.write_text(script)
    with pytest.raises(BuildError, match="cannot be loaded"):
        load(Settings(None, str(compiler)))


# ---- The product


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", NATIVE_KINDS)
@pytest.mark.parametrize(("k", "group_size"), [(2176, -1), (4224, 64), (1000, -1)])
def test_rows_are_as_if_they_were_alone(k: int, group_size: int, kind: str, dtype: str) -> None:
    """Bit for bit, whatever tile of rows they fall in, and in sums of more than one chunk; and right."""
    rng = np.random.default_rng(20)
    case = Case("", 530, k, 45, kind, group_size, zero_points=kind == "w4a16", scale_dtype="bfloat16")
    weight, x = case.weight(rng), case.activations(rng, dtype)
    whole = np.asarray(call(x, weight, implementation="native_cpu", out_dtype="float32"))
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 21), (21, 28), (28, 53), (500, 530)):
        part = call(x[first:last], weight, implementation="native_cpu", out_dtype="float32")
        np.testing.assert_array_equal(part, whole[first:last])
    expected = np.asarray(call(x, weight, implementation="reference", out_dtype="float32"))
    tolerance = 3e-6 if dtype == "float32" else 4e-3
    np.testing.assert_allclose(whole, expected, atol=tolerance * np.abs(expected).max())


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["w4a16", "w8a16", "w8a16_fp8"])
@pytest.mark.parametrize(("k", "group_size"), [(2304, 64), (2274, -1)])
def test_offsets_are_added_to_each_weight(k: int, group_size: int, kind: str, dtype: str) -> None:
    """In more than one chunk of inputs, with 7 rows and with 40; they are as large as weights."""
    rng = np.random.default_rng(23)
    case = Case("", 40, k, 45, kind, group_size, zero_points=kind != "w8a16_fp8", scale_dtype="bfloat16")
    weight, x = case.weight(rng), case.activations(rng, dtype)
    offsets = jnp.asarray(rng.uniform(-0.05, 0.05, weight.scales.shape), "bfloat16")
    weight = replace(weight, offsets=offsets)
    expected = np.asarray(call(x, weight, implementation="reference", out_dtype="float32"))
    tolerance = (3e-6 if dtype == "float32" else 4e-3) * np.abs(expected).max()
    for rows in (7, 40):
        found = call(x[:rows], weight, implementation="native_cpu", out_dtype="float32")
        np.testing.assert_allclose(found, expected[:rows], atol=tolerance)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "dtype_of_numbers"), [("w8a16_fp8", "float8_e4m3fn"), ("w8a16", "int8")])
def test_every_number_of_8_bits_means_what_it_should(kind: str, dtype_of_numbers: str, dtype: str) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(8, 32)
    stored = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.dtype(dtype_of_numbers))
    weight = QuantizedWeight(stored, jnp.ones((1, 8), jnp.float32), None, kind, -1)
    expected = np.asarray(stored.astype(jnp.float32))
    for row in range(32):  # one at a time: a NaN would spoil its whole row of products
        x = jnp.zeros((1, 32), dtype).at[0, row].set(1.0)
        usual = ~np.isnan(expected).any(1)
        found = np.asarray(call(x, weight, implementation="native_cpu", out_dtype="float32"))[0]
        np.testing.assert_array_equal(found[usual], expected[usual, row])
        assert np.isnan(found[~usual]).all()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero", [None, -8, 0, 7])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_every_number_of_4_bits_means_what_it_should(group_size: int, zero: int | None, dtype: str) -> None:
    numbers = np.tile(np.arange(-8, 8), 16).reshape(4, 64)
    groups = 1 if group_size < 0 else 2
    scales = np.asarray([[0.5, 1.0, -2.0, 4.0], [8.0, -1.0, 0.25, 2.0]])[:groups]
    zeros = None if zero is None else jnp.full((groups, 4), zero, jnp.int8)
    weight = QuantizedWeight(
        jnp.asarray(numbers, jnp.int4), jnp.asarray(scales, jnp.float32), zeros, "w4a16", group_size
    )
    found = call(jnp.eye(64, dtype=dtype), weight, implementation="native_cpu", out_dtype="float32")
    expected = (numbers - (zero or 0)) * np.repeat(scales.T, 64 // groups, 1)
    np.testing.assert_array_equal(np.asarray(found).T, expected)


@pytest.mark.parametrize("group_size", [-1, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_8_bit_floats_are_those_of_the_specification(dtype: str, group_size: int) -> None:
    """Bit for bit: numbers down to a millionth of the largest, which are e4m3's subnormal ones and zeros."""
    rng = np.random.default_rng(21)
    x = rng.standard_normal((64, 512)) * 10.0 ** rng.uniform(-6, 0, (64, 512))
    x[3] = 0
    x = jnp.asarray(x, dtype)
    found, scales = jax.jit(native_cpu._as_fp8, static_argnums=1)(x, group_size)
    expected, expected_scales = jax.jit(quantize_activations, static_argnums=(1, 2))(x, jnp.float8_e4m3fn, group_size)
    np.testing.assert_array_equal(found, expected.astype(jnp.float32))
    np.testing.assert_array_equal(scales, expected_scales)


@needs_compiler
def test_calls_from_several_threads_share_the_pool() -> None:
    """Products of several executables at once, more than there are threads: none waits for another."""
    case = Case("", 40, 512, 512, "w4a16", 32)
    rng = np.random.default_rng(22)
    weight, x = case.weight(rng), case.activations(rng, "bfloat16")
    expected = np.asarray(call(x, weight, implementation="native_cpu"))
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not np.array_equal(np.asarray(call(x, weight, implementation="native_cpu")), expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "stuck"
    assert not wrong


@needs_integers
@pytest.mark.parametrize(("k", "n"), [(64, 1), (1000, 45), (4097, 130)])
def test_sums_of_integers_are_exact(k: int, n: int) -> None:
    """The extremes of both sides among them."""
    rng = np.random.default_rng(24)
    x, stored = rng.integers(-128, 128, (13, k)), rng.integers(-128, 128, (n, k))
    x[0], stored[0] = -128, -128
    x[1] = 127
    for first, last in ((0, 1), (1, 3), (3, 6), (0, 13)):
        found = native_cpu._sums_of_integers(jnp.asarray(x[first:last], jnp.int8), jnp.asarray(stored, jnp.int8))
        np.testing.assert_array_equal(found, (x[first:last] @ stored.T).astype(np.float32))


@needs_integers
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("kind", ["w8a16", "w4a16"])
@pytest.mark.parametrize(("k", "n"), [(10, 3), (64, 8), (100, 37), (4200, 12)])
def test_two_digits_hold_bfloat16(k: int, n: int, kind: str, zero_points: bool) -> None:
    """Where no activation is less than a 128th of the largest, nothing is rounded but sums: with matrices that end
    inside a step, in more than one chunk, and in tiles of one to three rows.
    """
    rng = np.random.default_rng(25)
    weight = Case("", 7, k, n, kind, zero_points=zero_points).weight(rng)
    x = jnp.asarray(rng.uniform(1, 100, (7, k)) * rng.choice([-1, 1], (7, k)), "bfloat16")
    numbers = np.asarray(weight.stored, np.float64) - (
        0 if weight.zero_points is None else np.asarray(weight.zero_points).T
    )
    values = numbers * np.asarray(weight.scales, np.float64).T
    wide = np.asarray(x, np.float64)
    found = call(x, weight, implementation="native_cpu", out_dtype="float32")
    assert (np.abs(found - wide @ values.T) <= 1e-6 * (np.abs(wide) @ np.abs(values).T)).all()


@needs_integers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_digit_is_the_specification(dtype: str) -> None:
    """Bit for bit: numbers, scales and the order in which they are multiplied."""
    case = Case("", 70, 1000, 45, "w8a8")
    rng = np.random.default_rng(26)
    weight, x = case.weight(rng), case.activations(rng, dtype).at[3].set(0)
    found, expected = (call(x, weight, implementation=name, out_dtype="float32") for name in ("native_cpu", "xla"))
    np.testing.assert_array_equal(found, expected)


@needs_integers
@pytest.mark.parametrize(("bad", "shown"), [(np.nan, np.isnan), (np.inf, lambda found: ~np.isfinite(found))])
def test_what_is_no_number_stays_none(bad: float, shown: Callable[[np.ndarray], np.ndarray]) -> None:
    weight = from_dense(jnp.ones((64, 8)), "w8a16")
    x = jnp.ones((2, 64), "bfloat16").at[1, 5].set(bad)
    found = np.asarray(call(x, weight, implementation="native_cpu", out_dtype="float32"))
    np.testing.assert_allclose(found[0], 64, rtol=1e-6)
    assert shown(found[1]).all()


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.ones((2, 33))
    with pytest.raises(UnsupportedImplementationError, match="33 weights of 4 bits end inside a byte"):
        quantized_matmul(x, from_dense(jnp.ones((33, 8)), "w4a16"), implementation="native_cpu")
    monkeypatch.setattr(native_cpu.native, "unavailable", lambda: None)
    monkeypatch.setattr(native_cpu.native, "has_integer_dots", lambda: False)
    with pytest.raises(UnsupportedImplementationError, match="without AVX-512's dots of them"):
        quantized_matmul(x, from_dense(jnp.ones((33, 8)), "w8a8"), implementation="native_cpu")


_PORTABLE = """
import dataclasses, sys
import jax, numpy as np
from pallas_kernels.native import library
from pallas_kernels.quantized_matmul import KINDS, OP, from_dense, quantized_matmul
from pallas_kernels.quantized_matmul.cases import CASES
library._settings = library.Settings(machine=sys.argv[1])
assert not library.has_bfloat16_dots()
for kind, rows, chosen in (("w8a16", 2, "xla"), ("w4a16", 16, "native_cpu"), ("w4a16", 17, "xla")):
    quantized_matmul(jax.numpy.ones((rows, 32)), from_dense(jax.numpy.ones((32, 8)), kind))
    assert OP.chosen["quantized_matmul"].startswith(chosen + " (")
    assert ("yields: " in OP.chosen["quantized_matmul"]) == (chosen == "xla")
call = jax.jit(quantized_matmul, static_argnames=("out_dtype", "implementation"))
for case in CASES:
    if case.kind == "w8a8" and case.group_size < 0:
        continue
    for dtype, tolerance in (("float32", 3e-6), ("bfloat16", 4e-3)):
        rng = np.random.default_rng(1)
        weight, x = case.weight(rng), case.activations(rng, dtype)
        if KINDS[case.kind].activations is None:
            offsets = jax.numpy.asarray(rng.uniform(-0.1, 0.1, weight.scales.shape), weight.scales.dtype)
            weight = dataclasses.replace(weight, offsets=offsets)
        found, expected = (
            np.asarray(call(x, weight, implementation=i, out_dtype="float32")) for i in ("native_cpu", "reference")
        )
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), err_msg=case.name)
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("machine", ["-march=x86-64", "-march=x86-64-v3", "-march=x86-64-v4"])
def test_processors_without_dots_of_bfloat16(machine: str) -> None:
    """The suite again in a process whose library knows no bfloat16, and no AVX-512 or AVX."""
    command = [sys.executable, "-c", _PORTABLE, machine]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


_FROM_CACHE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from jax import monitoring
from pallas_kernels import native
from pallas_kernels.quantized_matmul import from_dense, quantized_matmul
native.configure(Path(sys.argv[1]) / "native")
jax.config.update("jax_compilation_cache_dir", sys.argv[1] + "/xla")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
weight = from_dense(jnp.asarray(np.arange(64.0 * 32).reshape(64, 32) % 7 - 3), "w4a16", 32)
hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
found = jax.jit(lambda x, w: quantized_matmul(x, w, implementation="native_cpu"))(jnp.ones((3, 64)), weight)
print(len(hits), np.asarray(found).tobytes().hex())
"""


@needs_compiler
@pytest.mark.slow
def test_an_executable_from_the_persistent_cache_finds_its_kernel(tmp_path: Path) -> None:
    lines = []
    for _ in range(2):
        command = [sys.executable, "-c", _FROM_CACHE, str(tmp_path)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr[-3000:]
        lines.append(result.stdout.split())
    assert lines[0][0] == "0" and lines[1][0] != "0"
    assert lines[0][1] == lines[1][1]
