"""Packing of weights, quantization of activations, and every product with packed weights against the reference."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.op import UnsupportedImplementationError
from pallas_kernels.quantized_matmul import (
    KINDS,
    OP,
    QuantizedWeight,
    dequantize,
    from_dense,
    quantize_activations,
    quantized_matmul,
    repack,
    xla,
)
from pallas_kernels.quantized_matmul.cases import CASES, GPU_CASES, Case
from pallas_kernels.quantized_matmul.rotation import rotate

# Of the largest result. float32 differs by the order of sums; 16-bit activations meet group-scaled weights that were
# rounded to the same 16 bits (2^-9 or 2^-12 each, random signs), and both grow with nothing but the sum's own size.
TOLERANCE = {"float32": 3e-6, "bfloat16": 4e-3, "float16": 5e-4}
IMPLEMENTATIONS = [i.name for i in OP.implementations if i.name not in ("reference", "mosaic_gpu_simulated")]
call = jax.jit(quantized_matmul, static_argnames=("out_dtype", "implementation"))


def independent(x: np.ndarray, weight: QuantizedWeight) -> np.ndarray:
    """The specification again, with numpy in float64 and an index for each number."""
    stored = np.asarray(weight.stored.astype(jnp.float32), np.float64)
    scales = np.asarray(weight.scales.astype(jnp.float32), np.float64)
    group = np.arange(weight.k) // (weight.k if weight.group_size < 0 else weight.group_size)
    zeros = np.zeros(scales.shape) if weight.zero_points is None else np.asarray(weight.zero_points, np.float64)
    values = (stored - zeros[group].T) * scales[group].T
    dtype = KINDS[weight.kind].activations
    x = x.astype(np.float64)
    if weight.rotation:
        x = (x @ turning(weight.k, weight.rotation)).astype(np.float32).astype(np.float64)
    if dtype is not None:
        limit = 127.0 if dtype == "int8" else 448.0
        for g in range(group.max() + 1):
            scale = np.abs(x[:, group == g]).max(1, keepdims=True).astype(np.float32) / np.float32(limit)
            numbers = (x[:, group == g] / scale).astype(np.float32)
            rounded = np.rint(numbers) if dtype == "int8" else numbers.astype(jnp.float8_e4m3fn)
            x[:, group == g] = rounded.astype(np.float64) * scale
    return x @ values.T


def turning(k: int, size: int) -> np.ndarray:
    """[K, K]: entry by entry, the sign is the parity of the bits that two places of a block share."""
    matrix = np.zeros((k, k))
    for i in range(k):
        for j in range(i // size * size, (i // size + 1) * size):
            matrix[i, j] = (-1) ** (i % size & j % size).bit_count() / np.sqrt(size)
    return matrix


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_reference_against_numpy(case: Case) -> None:
    rng = np.random.default_rng(0)
    weight, x = case.weight(rng), case.activations(rng, "float32")
    expected = independent(np.asarray(x), weight)
    found = call(x, weight, implementation="reference")
    # A number on the edge between two roundings of an activation may fall to either side.
    edge = 3e-3 if KINDS[case.kind].activations else 0
    np.testing.assert_allclose(found, expected, atol=(3e-6 + edge) * np.abs(expected).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_reference(case: Case, implementation: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    weight, x = case.weight(rng), case.activations(rng, dtype)
    try:
        found = call(x, weight, implementation=implementation, out_dtype="float32")
    except UnsupportedImplementationError as refused:
        pytest.skip(str(refused))
    expected = np.asarray(call(x, weight, implementation="reference", out_dtype="float32"))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype] * np.abs(expected).max())
    assert call(x, weight, implementation=implementation).dtype == x.dtype


@pytest.mark.parametrize("case", [c for c in CASES if not KINDS[c.kind].activations], ids=lambda c: c.name)
def test_chunks_of_outputs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What large weights take on a CPU, on small ones."""
    case = replace(case, n=384 if case.n > 128 else 256)
    weight, x = case.weight(np.random.default_rng(6)), case.activations(np.random.default_rng(7), "bfloat16")
    whole = xla._weight_only(x, weight)
    assert xla.chunk_of(weight) == case.n
    monkeypatch.setattr(xla, "LEAST_CHUNKED", 0)
    monkeypatch.setattr(xla, "CHUNK", 128)
    assert xla.chunk_of(weight) == (case.n if "fp8" in case.kind else 128)
    found = jax.jit(xla._in_chunks)(x, weight)
    np.testing.assert_allclose(found, whole, atol=3e-6 * np.abs(np.asarray(whole)).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_scale_out_of_place_is_seen(implementation: str) -> None:
    """The tolerance is narrow enough: scales or zero points of two neighbouring groups or outputs exchanged show."""
    case = Case("", 4, 256, 128, "w4a16", 64, zero_points=True)
    rng = np.random.default_rng(2)
    weight, x = case.weight(rng), case.activations(rng, "bfloat16")
    assert weight.zero_points is not None
    expected = np.asarray(call(x, weight, implementation="reference", out_dtype="float32"))
    swapped = [1, 0, *range(2, case.n)]
    for wrong in (
        QuantizedWeight(weight.stored, weight.scales[::-1], weight.zero_points, "w4a16", 64),
        QuantizedWeight(weight.stored, weight.scales[:, jnp.array(swapped)], weight.zero_points, "w4a16", 64),
        QuantizedWeight(weight.stored, weight.scales, weight.zero_points[::-1], "w4a16", 64),
    ):
        try:
            found = np.asarray(call(x, wrong, implementation=implementation, out_dtype="float32"))
        except UnsupportedImplementationError as refused:
            pytest.skip(str(refused))
        assert np.abs(found - expected).max() > 5 * TOLERANCE["bfloat16"] * np.abs(expected).max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch_mates(kind: str, implementation: str) -> None:
    rng = np.random.default_rng(3)
    case = Case("", 8, 256, 128, kind)
    weight, x = case.weight(rng), case.activations(rng, "bfloat16")
    other = x.at[1:].set(case.activations(rng, "bfloat16")[1:])
    try:
        found = [call(rows, weight, implementation=implementation, out_dtype="float32") for rows in (x, other)]
    except UnsupportedImplementationError as refused:
        pytest.skip(str(refused))
    np.testing.assert_array_equal(found[0][0], found[1][0])


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_round_to_nearest(kind: str, group_size: int, zero_points: bool, scale_dtype: str) -> None:
    """Every value lies within half a step of what it stands for, and the numbers use their range."""
    if zero_points and (KINDS[kind].activations or "fp8" in kind):
        with pytest.raises(ValueError, match="no zero points"):
            from_dense(jnp.ones((128, 8)), kind, group_size, zero_points=True)
        return
    rng = np.random.default_rng(4)
    dense = rng.standard_normal((2, 256, 24)).astype(np.float32) + 0.3
    weight = from_dense(
        jnp.asarray(dense), kind, group_size, zero_points=zero_points, scale_dtype=jnp.dtype(scale_dtype)
    )
    assert (weight.k, weight.n) == (256, 24) and weight.stored.dtype == KINDS[kind].dtype
    assert weight.scales.dtype == scale_dtype
    found = np.swapaxes(np.asarray(dequantize(weight)), -1, -2)
    size = 256 if group_size < 0 else group_size
    steps = np.repeat(np.asarray(weight.scales, np.float32), size, axis=1)
    # Half a step, and the clipped edge: scales rounded to 8 or 11 bits move the largest of 127 or 448 numbers.
    slack = {"float32": 1e-4, "float16": 0.07, "bfloat16": 0.5}[scale_dtype] * (0.1 if KINDS[kind].bits == 4 else 1)
    slack += 0.5 if zero_points else 0  # the zero point itself is rounded
    bound = steps * (0.5 + slack) if "fp8" not in kind else np.maximum(np.abs(dense) / 16, steps * 2.0**-9) + steps
    assert (np.abs(found - dense) <= bound).all()
    numbers = np.asarray(weight.stored.astype(jnp.float32))
    assert np.abs(numbers).max() == KINDS[kind].largest + (1 if zero_points else 0)


def test_zero_points_reach_the_ends_of_their_range() -> None:
    """All values of one sign: the zero point goes to an end of its range, and zeros of a weight stay zeros."""
    positive = jnp.concatenate([jnp.linspace(1.0, 16.0, 31), jnp.zeros(1)])[:, None]
    weight = from_dense(jnp.concatenate([positive, -positive, 0 * positive], 1), "w4a16", 32, zero_points=True)
    assert weight.zero_points is not None
    np.testing.assert_array_equal(weight.zero_points, [[-8, 7, -8]])
    np.testing.assert_array_equal(dequantize(weight)[:, -1], 0)
    np.testing.assert_array_equal(dequantize(weight)[2], 0)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_turned_weights_stand_for_the_same_values(size: int) -> None:
    rng = np.random.default_rng(13)
    dense = rng.standard_normal((192, 24)).astype(np.float32)
    weight = from_dense(jnp.asarray(dense), "w8a8", rotation=size)
    turned = turning(192, size) @ dense
    scales = np.asarray(weight.scales)
    np.testing.assert_allclose(scales[0], np.abs(turned).max(0) / 127, rtol=1e-6)
    # A number on the edge between two roundings may fall to either side.
    assert np.abs(np.asarray(weight.stored, np.float32).T * scales - turned).max() <= 0.5001 * scales.max()
    assert np.abs(np.asarray(dequantize(weight)).T - dense).max() < 0.5 * scales.max() * np.sqrt(size)
    assert np.abs(np.asarray(dequantize(weight)).T - dense).std() < 0.31 * scales.mean()


def test_a_large_activation_takes_no_range_from_the_others() -> None:
    """What rotation is for: one input 300 times as large as the others, and hardly any weight on it."""
    rng = np.random.default_rng(14)
    x, dense = rng.standard_normal((16, 256)), rng.standard_normal((256, 64))
    x[:, 37] *= 300
    dense[37] *= 1e-3
    x, dense = jnp.asarray(x, jnp.float32), jnp.asarray(dense, jnp.float32)
    expected = np.asarray(jnp.matmul(x, dense, precision="highest"))

    def error(rotation: int) -> float:
        found = np.asarray(call(x, from_dense(dense, "w8a8", rotation=rotation)))
        return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))

    assert error(64) < 0.35 * error(0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [*(pytest.param(n, marks=pytest.mark.slow) for n in (16, 32)), 64])
def test_rotation_is_that_of_the_matrix_and_of_each_row(size: int, dtype: str) -> None:
    rng = np.random.default_rng(16)
    x = jnp.asarray(rng.standard_normal((37, 192)) * rng.uniform(0.1, 30, (37, 1)), dtype)
    run = jax.jit(rotate, static_argnums=1)
    whole = np.asarray(run(x, size), np.float32)
    bound = 3e-6 if dtype == "float32" else 2.0**-8
    expected = np.asarray(x, np.float64) @ turning(192, size)
    assert (np.abs(whole - expected) <= bound * (np.abs(expected) + np.abs(x).max(1, keepdims=True) * 0.2)).all()
    for first, last in ((0, 1), (5, 9), (20, 37)):
        assert np.array_equal(np.asarray(run(x[first:last], size), np.float32), whole[first:last])


def test_rotated_float16_does_not_overflow() -> None:
    """64 inputs of 30,000 of one sign turn into one of 240,000; the result is in range again."""
    weight = from_dense(jnp.full((64, 8), 2.0**-10), "w8a8", rotation=64)
    found = call(jnp.full((2, 64), 30000.0, jnp.float16), weight)
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(found, np.float32), 1875.0, rtol=0.01)


@pytest.mark.parametrize("rotation", [8, 24, 48, 128])
def test_rotations_that_are_none(rotation: int) -> None:
    with pytest.raises(ValueError, match=f"rotation of {rotation} inputs"):
        from_dense(jnp.ones((192, 8)), "w8a8", rotation=rotation)


@pytest.mark.parametrize(
    ("group_size", "rows", "scale_dtype"), [(-1, 1, "float32"), (64, 1, "bfloat16"), (64, 8, "float32")]
)
def test_scales_that_lose_least(group_size: int, rows: int, scale_dtype: str) -> None:
    """Each scale is one of the candidates, and none of the others loses less, by numpy in float64."""
    rng = np.random.default_rng(15)
    dense = rng.standard_normal((192, 16)).astype(np.float32)
    dense[:, 5] = 0
    importance = rng.uniform(0.1, 10, 192).astype(np.float32)
    count = 8
    weight = from_dense(
        jnp.asarray(dense), "w8a16_fp8", group_size, rows_per_scale=rows, scale_dtype=jnp.dtype(scale_dtype),
        num_scales=count, importance=jnp.asarray(importance),
    )  # fmt: skip
    size, chosen = 192 if group_size < 0 else group_size, set()
    for first in range(0, 16, rows):
        for start in range(0, 192, size):
            part = dense[start : start + size, first : first + rows]
            each = importance[start : start + size, None]
            losses = {}
            for index in range(count):
                scale = np.float32(np.abs(part).max() * np.float32(1 / 448)) * np.float32(2 ** (index / count))
                scale = np.float32(scale.astype(jnp.dtype(scale_dtype)))
                numbers = (part / (scale or 1)).astype(jnp.float8_e4m3fn).astype(np.float64)
                losses[scale] = float((each * (numbers * scale - part) ** 2).sum())
            found = set(np.asarray(weight.scales, np.float32)[start // size, first : first + rows].tolist())
            assert len(found) == 1
            (scale,) = found
            assert any(abs(scale - other) <= 1e-6 * other for other in losses)
            assert min(loss for other, loss in losses.items() if abs(scale - other) <= 1e-6 * other) <= min(
                losses.values()
            ) * (1 + 1e-5)
            chosen.add(round(float(scale / (np.abs(part).max() or 1) * 448), 2))
    assert len(chosen) > 2  # others than the largest number's own


def test_integers_have_no_scales_to_choose_among() -> None:
    with pytest.raises(ValueError, match="no scales to choose"):
        from_dense(jnp.ones((64, 8)), "w8a16", num_scales=8)


def test_repack_scales() -> None:
    """One scale, one per output, per group, per block with a short last block: all mean the same product."""
    rng = np.random.default_rng(5)
    stored = jnp.asarray(rng.integers(-127, 128, (192, 256)), jnp.int8)
    wide = np.asarray(stored, np.float32)

    def values(scales: np.ndarray, **options: int) -> np.ndarray:
        return np.asarray(dequantize(repack(stored, jnp.asarray(scales, jnp.float32), kind="w8a16", **options)))

    np.testing.assert_array_equal(values(np.float32(0.5)), wide * 0.5)
    np.testing.assert_array_equal(values(np.full(1, 0.25)), wide * 0.25)
    rows = np.float32(2.0) ** rng.integers(-4, 4, (192, 1))
    np.testing.assert_array_equal(values(-rows), wide * -rows)  # negative scales are some checkpoints' own
    groups = np.float32(2.0) ** rng.integers(-4, 4, (192, 4))
    np.testing.assert_array_equal(values(groups, group_size=64), wide * np.repeat(groups, 64, 1))
    blocks = np.float32(2.0) ** rng.integers(-4, 4, (2, 2))
    expected = wide * np.repeat(np.repeat(blocks, 128, 1), 128, 0)[:192]
    np.testing.assert_array_equal(values(blocks, group_size=128, rows_per_scale=128), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "w3a16"}, "none of w8a16"),
        ({"group_size": 96}, "none of -1, 16, 32"),
        ({"group_size": 128}, "192 inputs are not a multiple"),
        ({"kind": "w8a8", "zero_points": jnp.ones((8, 1))}, "no zero points"),
        ({"scales": jnp.ones((8, 1), jnp.int8)}, "scales are int8"),
    ],
)
def test_repack_refuses(change: dict, message: str) -> None:
    arguments = {"stored": jnp.ones((8, 192)), "scales": jnp.ones((8, 1)), "kind": "w8a16"}
    with pytest.raises(ValueError, match=message):
        repack(**(arguments | change))


def test_size_and_tree() -> None:
    weight = from_dense(jnp.ones((256, 64)), "w4a16", 64, zero_points=True, scale_dtype=jnp.bfloat16)
    assert weight.size_bytes == 256 * 64 // 2 + 4 * 64 * 2 + 4 * 64
    leaves, structure = jax.tree.flatten(weight)
    assert [leaf.shape for leaf in leaves] == [(64, 256), (4, 64), (4, 64)]
    assert jax.tree.unflatten(structure, leaves).group_size == 64
    assert jax.tree.structure(from_dense(jnp.ones((256, 64)), "w4a16", 32, zero_points=True)) != structure


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127), ("float8_e4m3fn", 448)])
def test_quantize_activations(dtype: str, largest: int) -> None:
    x = jnp.asarray([[0.5, -2.0, 1.0, 0.0], [0.0, 0.0, 3e38, 1.0]], jnp.float32)
    stored, scales = quantize_activations(x, jnp.dtype(dtype), 2)
    assert stored.dtype == dtype
    np.testing.assert_allclose(scales, np.asarray([[2.0, 1.0], [0.0, 3e38]]) / largest, rtol=1e-6)
    wide = np.asarray(stored, np.float32)
    np.testing.assert_array_equal(np.abs(wide).reshape(2, 2, 2).max(-1), [[largest, largest], [0, largest]])
    np.testing.assert_allclose(
        wide * np.repeat(scales, 2, 1), [[0.5, -2.0, 1.0, 0.0], [0.0, 0.0, 3e38, 0.0]], rtol=0.07
    )
    whole, per_token = quantize_activations(x, jnp.dtype(dtype))
    np.testing.assert_allclose(per_token, np.asarray([[2.0], [3e38]]) / largest, rtol=1e-6)
    assert np.abs(np.asarray(whole, np.float32)).max(1).tolist() == [largest, largest]


def test_int8_activations_round_half_to_even() -> None:
    stored, scales = quantize_activations(jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]), jnp.int8)
    assert float(scales[0, 0]) == 1.0
    np.testing.assert_array_equal(stored, [[127, 0, 2, 2, 0, -2]])


def test_strict_implementation_and_shapes() -> None:
    weight = from_dense(jnp.ones((256, 64)), "w8a16")
    with pytest.raises(UnsupportedImplementationError, match="no implementation 'cuda'"):
        quantized_matmul(jnp.ones((1, 256)), weight, implementation="cuda")
    with pytest.raises(ValueError, match="do not meet"):
        quantized_matmul(jnp.ones((1, 128)), weight)


def test_case_names_are_unique() -> None:
    names = [case.name for case in (*CASES, *GPU_CASES)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", [c for c in CASES if c.kind in ("w8a16", "w4a16")], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_digits_are_as_exact_as_their_dtype(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with magnitudes of one token far apart; and each token as if it were alone, bit for bit."""
    monkeypatch.setattr(xla, "MOST_ROWS_IN_GROUPS", 1 << 20)
    monkeypatch.setattr(xla, "LEAST_CHUNKED", 0)
    rng = np.random.default_rng(8)
    weight, x = case.weight(rng), case.activations(rng, "float32") * 10.0 ** rng.uniform(-3, 1, case.k)
    x = jnp.concatenate([x, jnp.zeros_like(x[:1])]).astype(dtype)
    run = jax.jit(lambda x, w: xla.run(x, w, jnp.float32))
    found, expected = (
        np.asarray(run(x, weight)),
        np.asarray(call(x, weight, implementation="reference", out_dtype="float32")),
    )
    bound = 3e-6 if dtype == "float32" else 2e-4  # 16 bits: 2^-16 of the largest activation each
    np.testing.assert_allclose(found, expected, atol=bound * np.abs(expected).max())
    assert not found[-1].any()
    for row in (0, len(x) - 2):
        assert np.array_equal(np.asarray(run(x[row : row + 1], weight))[0], found[row])


def test_the_largest_activation_fits_its_digits() -> None:
    """In fixed point it is the largest number there is, but for three in 100,000 that come out larger by one: without a
    limit they would turn into the smallest.
    """
    limit = 127 * (256**3 - 1) // 255
    largest = np.random.default_rng(11).uniform(1, 2, 2_000_000).astype(np.float32)
    largest = largest[np.rint(largest * (np.float32(1) / (largest * np.float32(1 / limit)))) > limit]
    assert len(largest) > 10
    rng = np.random.default_rng(12)
    weight = from_dense(jnp.asarray(rng.standard_normal((64, 128)), jnp.float32), "w8a16")
    x = jnp.asarray(rng.uniform(-1, 1, (len(largest), 64)), jnp.float32).at[:, 5].set(largest)
    found, expected = (np.asarray(call(x, weight, implementation=i)) for i in ("xla", "reference"))
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_integers_on_both_sides_do_not_depend_on_the_rows_beside(dtype: str) -> None:
    case = Case("", 37, 576, 192, "w8a8")
    rng = np.random.default_rng(10)
    weight, x = case.weight(rng), case.activations(rng, dtype)
    run = jax.jit(lambda x, w: xla.run(x, w, jnp.float32))
    whole = np.asarray(run(x, weight))
    for first, last in ((0, 1), (5, 9), (20, 37)):
        assert np.array_equal(np.asarray(run(x[first:last], weight)), whole[first:last])


def test_converted_weights_do_not_pile_up() -> None:
    """A chain of products with weights that have to be converted: room for about one of them, not for all."""
    size, count = 512, 12
    dense = jnp.asarray(np.random.default_rng(9).standard_normal((size, size)), jnp.float32)

    def chain(x: jax.Array, weights: list[QuantizedWeight]) -> jax.Array:
        for weight in weights:
            x = xla.run(x, weight, jnp.dtype(jnp.bfloat16))
        return x

    for kind, group_size in (("w4a16", 128), ("w8a16_fp8", -1), ("w8a8_fp8", -1), ("w8a8_fp8", 128)):
        weights = [from_dense(dense, kind, group_size)] * count
        x = jax.ShapeDtypeStruct((64, size), jnp.bfloat16)
        memory = jax.jit(chain).lower(x, weights).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 5 * 2 * size * size, (kind, group_size)
