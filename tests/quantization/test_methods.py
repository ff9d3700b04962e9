"""Which ways of quantizing a checkpoint are known, and what is said of those that are not supported."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import UnsupportedModelError
from models.loading.load import load_model
from models.quantization.checkpoints import METHODS, UNSUPPORTED
from tests.models.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint


@pytest.mark.parametrize("method", sorted(UNSUPPORTED))
def test_refused_by_name(method: str, tmp_path: Path) -> None:
    """With what is supported, and before any tensor is read."""
    raw = tiny_config() | {"quantization_config": {"quant_method": method}}
    write_checkpoint(tmp_path, raw, random_tensors(tiny_config()))
    with pytest.raises(UnsupportedModelError) as error:
        load_model(tmp_path)
    message = str(error.value)
    assert f"quantized by {method!r} ({UNSUPPORTED[method]})" in message
    assert all(name in message for name in METHODS) and "GGUF" in message


def test_quanto_by_its_side_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(), random_tensors(tiny_config()))
    (tmp_path / "quanto_qmap.json").write_text('{"model.layers.0.mlp.down_proj": {"weights": "qint8"}}')
    with pytest.raises(UnsupportedModelError, match="quantized by 'quanto'"):
        load_model(tmp_path)


def test_no_method_is_both() -> None:
    assert not METHODS.keys() & UNSUPPORTED.keys()
