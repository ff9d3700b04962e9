"""The benchmark of packed products: what it times is a chain of real products, and its ratios are to dense weights."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from benchmarks import packed_products
from benchmarks.packed_products import Format, main, ratios, step
from pallas_kernels.matmul import matmul


def test_ratios() -> None:
    found = ratios({"dense": [2.0, 4.0, 8.0], "a": [1.0, 1.0, 8.0]})
    assert found == {"dense": "1.00, 1.00", "a": "0.50, 0.50"}


def test_a_step_waits_for_each_product() -> None:
    """The second product sees what the first one gave."""
    weights = [jnp.full((2, 3), 1e8), jnp.ones((2, 1))]
    found = step(lambda x, w: matmul(x, w), ((2, 3), (2, 1)))(jnp.ones((1, 2)), weights)
    assert float(found[0, 0]) == pytest.approx(6e8 + 2 * (1 + 6), rel=1e-6)


def test_main_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(packed_products.SHAPES, "4096x4096", ((64, 32),) * 2)
    monkeypatch.setattr(packed_products, "FORMATS", {"int4, group 64": Format("w4a16", 64), "w": Format("w8a8")})
    main(["--model", "4096x4096", "--rows", "1,3", "--turns", "1", "--implementations", "xla"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0] == "|  | M=1 | M=3 |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| dense, ms", "| int4, group 64: xla", "| w: xla"]
