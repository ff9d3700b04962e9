"""Heads: numbers against numpy, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder import Decoder
from models.drafters.eagle import EagleHead
from models.drafters.load import LoadedHead, load_eagle, load_medusa
from models.drafters.medusa import MedusaHeads
from models.errors import ModelNotFoundError, UnsupportedModelError, WeightsError
from models.functional import FunctionalModel, Params
from models.inputs import ForwardInputs
from models.loading.load import LoadedModel, load_model
from pallas_kernels.kv_layout import KVLayout, Pages
from pallas_kernels.paged_attention import AttentionProblem
from pallas_kernels.ragged import RaggedBatch
from tests.models.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.models.tiny_heads import (
    Tensors,
    eagle3_random,
    eagle3_reference,
    eagle_random,
    eagle_raw,
    eagle_reference,
    medusa_random,
    norm,
    silu,
)

PAGE, LENGTH, PAGES = 4, 10, 8
FLOAT32 = np.dtype(np.float32)
TARGET_RAW = tiny_config(num_hidden_layers=7)
MEDUSA_RAW = {"medusa_num_heads": 2, "medusa_num_layers": 1}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random decoder of seven layers."""
    return load_model(write_checkpoint(tmp_path_factory.mktemp("target"), TARGET_RAW, random_tensors(TARGET_RAW)))


def problem(raw: dict[str, Any]) -> AttentionProblem:
    """Attention as a config's sizes say."""
    return AttentionProblem(
        raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"], PAGE, "float32", "float32"
    )


def empty(raw: dict[str, Any], layers: int) -> tuple[Pages, ...]:
    """A cache."""
    layout = KVLayout(PAGES, raw["num_key_value_heads"], PAGE, raw["head_dim"], "float32")
    return tuple(layout.empty() for _ in range(layers))


def batch(start: int, stop: int) -> RaggedBatch:
    """One sequence, whose positions `[start, stop)` are computed."""
    table = jnp.arange(1, PAGES, dtype=jnp.int32)[None]
    return RaggedBatch(jnp.array([0, stop - start]), jnp.array([stop]), table, jnp.array(1))


def decoder(loaded: LoadedModel) -> Decoder:
    """The target's module."""
    build = partial(Decoder, loaded.config, problem(TARGET_RAW), dtype="float32")
    return FunctionalModel(build).bind(loaded.params)


def eagle(loaded: LoadedHead[Any], raw: dict[str, Any]) -> EagleHead:
    """The head's module."""
    return FunctionalModel(partial(EagleHead, loaded.config, problem(raw), dtype="float32")).bind(loaded.params)


def in_parts(head: EagleHead, bound: Decoder, raw: dict[str, Any], ids: np.ndarray, features: jax.Array) -> np.ndarray:
    """Features of a sequence, computed in chunks over the paged cache."""
    cache, outs = empty(raw, raw["num_hidden_layers"]), []
    for start, stop in ((0, LENGTH - 1), (LENGTH - 1, LENGTH)):
        positions = jnp.arange(start, stop)
        tokens = jnp.asarray(ids[start:stop])
        out, cache = head(bound, tokens, features[start:stop], positions, batch(start, stop), cache)
        outs.append(out)
    return np.concatenate(outs)


def test_taps_are_the_streams_between_layers(target: LoadedModel) -> None:
    """A tap after n layers is what a decoder of n layers ends with, before its norm; without taps nothing is given."""
    ids = jnp.arange(3, 3 + LENGTH)
    inputs = ForwardInputs(ids, jnp.arange(LENGTH), jnp.array([0]), batch(0, LENGTH))
    bound = decoder(target)
    hidden, tapped, _ = bound.run_tapped(inputs, empty(TARGET_RAW, 7), (0, 2, 7))
    plain, cache = bound(inputs, empty(TARGET_RAW, 7))
    assert len(cache) == 7
    assert tapped is not None and tapped.shape == (LENGTH, 3 * 12)
    np.testing.assert_array_equal(hidden, plain)
    np.testing.assert_array_equal(tapped[:, :12], bound.embed.weight[...][ids])
    np.testing.assert_allclose(bound.norm(tapped[:, 24:]), hidden, rtol=1e-6)
    assert bound.run_tapped(inputs, empty(TARGET_RAW, 7), ())[1] is None
    short = decoder(target)
    short.layers = short.layers[:2]
    second = short.run_tapped(inputs, empty(TARGET_RAW, 2), (2,))[1]
    np.testing.assert_allclose(tapped[:, 12:24], second, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # the fast one: tests/engine/test_head_drafters.py
@pytest.mark.parametrize(("layers", "bias", "own_head"), [(1, True, False), (2, False, True)])
def test_eagle(tmp_path: Path, target: LoadedModel, layers: int, bias: bool, own_head: bool) -> None:
    """Features and logits as numpy has them, in chunks over pages."""
    rng = np.random.default_rng(7)
    raw = eagle_raw(TARGET_RAW, num_hidden_layers=layers)
    tensors = eagle_random(raw, bias=bias)
    if own_head:
        tensors["lm_head.weight"] = rng.standard_normal((40, 12)).astype(np.float32)
    loaded = load_eagle(write_checkpoint(tmp_path, raw, tensors), "eagle", target.config, target.params, FLOAT32)
    head, bound = eagle(loaded, raw), decoder(target)
    ids, features = rng.integers(0, 40, LENGTH), rng.standard_normal((LENGTH, 12)).astype(np.float32)
    given = jnp.asarray(features)
    assert head.features(given) is given
    found = in_parts(head, bound, raw, ids, given)
    table = np.asarray(target.params["embed.weight"])
    expected = eagle_reference(raw, tensors, table[ids], features)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    rows = tensors["lm_head.weight"] if own_head else np.asarray(target.params["head.weight"])
    np.testing.assert_allclose(head.logits(bound, jnp.asarray(expected)), expected @ rows.T, rtol=1e-3, atol=1e-4)


@pytest.mark.slow  # the fast one: tests/engine/test_head_drafters.py
@pytest.mark.parametrize("layout", ["authors", "speculators"])
def test_eagle3(tmp_path: Path, target: LoadedModel, layout: str) -> None:
    """The same with a vocabulary of its own, another width, an embedding of its own, and either residual."""
    rng, name = np.random.default_rng(8), "midlayer" if layout == "authors" else "layers.0"
    raw = eagle_raw(TARGET_RAW, hidden_size=18, target_hidden_size=12, draft_vocab_size=15)
    tensors = eagle3_random(raw, 12, name=name)
    tensors["embed_tokens.weight"] = rng.standard_normal((40, 18)).astype(np.float32)
    written = raw
    if layout == "speculators":  # which norms the residual, too, unless it says otherwise
        outer = ("target_hidden_size", "draft_vocab_size")
        inner = {key: value for key, value in raw.items() if key not in outer}
        written = {key: raw[key] for key in outer}
        written |= {"speculators_model_type": "eagle3", "transformer_layer_config": inner}
        raw = raw | {"norm_before_residual": True}
    loaded = load_eagle(write_checkpoint(tmp_path, written, tensors), "eagle3", target.config, target.params, FLOAT32)
    assert loaded.config.taps == (2, 3, 4)
    head, bound = eagle(loaded, raw), decoder(target)
    ids, states = rng.integers(0, 40, LENGTH), rng.standard_normal((LENGTH, 36)).astype(np.float32)
    features = head.features(jnp.asarray(states))
    np.testing.assert_allclose(features, states @ tensors["fc.weight"].T, rtol=1e-4, atol=1e-5)
    found = in_parts(head, bound, raw, ids, features)
    expected = eagle3_reference(raw, tensors, tensors["embed_tokens.weight"][ids], np.asarray(features), name)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    own = norm(expected, tensors["norm.weight"], 1e-5) @ tensors["lm_head.weight"].T
    logits = np.asarray(head.logits(bound, jnp.asarray(expected)))
    np.testing.assert_allclose(logits[:, np.flatnonzero(tensors["t2d"])], own, rtol=1e-3, atol=1e-4)
    assert np.isneginf(logits[:, ~tensors["t2d"]]).all()


def test_equal_embedding_is_kept_once(tmp_path: Path, target: LoadedModel) -> None:
    """A copy of the target's table is dropped; another one is kept."""
    raw = eagle_raw(TARGET_RAW)
    table = np.array(target.params["embed.weight"])
    copied = eagle_random(raw) | {"embed_tokens.weight": table}
    write_checkpoint(tmp_path, raw, copied)
    assert not load_eagle(tmp_path, "eagle", target.config, target.params, FLOAT32).config.own_embed
    write_checkpoint(tmp_path, raw, copied | {"embed_tokens.weight": table + 1})
    loaded = load_eagle(tmp_path, "eagle", target.config, target.params, FLOAT32)
    assert loaded.config.own_embed and "embed.weight" in loaded.params


def as_vllm(tensors: Tensors) -> Tensors:
    """The authors' names of Medusa tensors as vLLM's."""
    renamed = {}
    for name, tensor in tensors.items():
        head, block, *rest = name.split(".")
        renamed[f"blocks.{head}.layers.{block}.{rest[1]}" if len(rest) == 2 else f"lm_heads.{head}.weight"] = tensor
    return renamed


@pytest.mark.parametrize("layout", ["authors", "prefixed", "vllm", "truncated"])
def test_medusa(tmp_path: Path, target: LoadedModel, layout: str) -> None:
    """Each head's logits as numpy has them."""
    known = 9 if layout == "truncated" else 40
    tensors = medusa_random(12, known, heads=2, layers=2)
    raw: dict[str, Any] = {"medusa_num_heads": 2, "medusa_num_layers": 2}
    written, ids = tensors, np.arange(40)
    if layout == "prefixed":
        written = {f"medusa_head.{name}": tensor for name, tensor in tensors.items()}
    elif layout != "authors":
        raw = {"num_heads": 2, "num_hidden_layers": 2, "hidden_size": 12, "vocab_size": 40}
        written = as_vllm(tensors)
    if layout == "truncated":
        ids = np.random.default_rng(1).choice(40, known, replace=False)
        raw["truncated_vocab_size"] = known
        written |= {"token_map": ids}
    loaded = load_medusa(write_checkpoint(tmp_path, raw, written), target.config, FLOAT32)
    heads = FunctionalModel(partial(MedusaHeads, loaded.config, dtype="float32")).bind(loaded.params)
    hidden = np.random.default_rng(2).standard_normal((5, 12)).astype(np.float32)
    for head in range(2):
        x = hidden
        for block in range(2):
            x = x + silu(x @ tensors[f"{head}.{block}.linear.weight"].T + tensors[f"{head}.{block}.linear.bias"])
        logits = np.asarray(heads.logits(jnp.asarray(hidden), head))
        np.testing.assert_allclose(logits[:, ids], x @ tensors[f"{head}.2.weight"].T, rtol=1e-4, atol=1e-5)
        assert np.isneginf(np.delete(logits, ids, axis=1)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, "hidden_size is 16 .* 12"),
        ({"vocab_size": 44}, "vocab_size is 44 .* 40"),
        ({"truncated_vocab_size": 50}, "truncated_vocab_size is 50 .* 40"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5"),
        ({"medusa_num_heads": None}, "medusa_num_heads is missing"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized heads are not supported"),
    ],
)
def test_medusa_config_errors(tmp_path: Path, target: LoadedModel, changes: dict[str, Any], message: str) -> None:
    """One error that names both sizes."""
    write_checkpoint(tmp_path, MEDUSA_RAW | changes, medusa_random(12, 40, 2, 1))
    with pytest.raises(UnsupportedModelError, match=message):
        load_medusa(tmp_path, target.config, FLOAT32)


def test_medusa_weight_errors(tmp_path: Path, target: LoadedModel) -> None:
    """Missing, extra and misshapen tensors in one error; a pickle is none of ours."""
    tensors = medusa_random(16, 40, 2, 1)
    del tensors["1.0.linear.weight"]
    write_checkpoint(tmp_path, MEDUSA_RAW, tensors | {"2.0.linear.weight": np.zeros((12, 12), np.float32)})
    with pytest.raises(
        WeightsError, match=r"medusa head; 1 missing, 5 misshapen, 1 unexpected.*\[16, 16\].*\[12, 12\]"
    ):
        load_medusa(tmp_path, target.config, FLOAT32)
    (tmp_path / "model.safetensors").rename(tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ModelNotFoundError, match=r"\.pt cannot be read: convert"):
        load_medusa(tmp_path, target.config, FLOAT32)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        load_medusa(tmp_path, target.config, FLOAT32)
    raw = MEDUSA_RAW | {"truncated_vocab_size": 9}
    write_checkpoint(tmp_path, raw, medusa_random(12, 9, 2, 1) | {"token_map": np.zeros(9, np.int64)})
    with pytest.raises(WeightsError, match="token_map does not name 9 different tokens"):
        load_medusa(tmp_path, target.config, FLOAT32)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("eagle", {"vocab_size": 44}, "vocab_size is 44 .* 40"),
        ("eagle", {"hidden_size": 18}, "hidden_size is 18 .* 12"),
        ("eagle", {"speculators_model_type": "eagle"}, "speculators_model_type is 'eagle'"),
        ("eagle", {"add_para_norm": True}, "add_para_norm"),
        ("eagle3", {"target_hidden_size": 16}, "target_hidden_size is 16 .* 12"),
        ("eagle3", {"hidden_size": 18}, "hidden_size is 18 .* 12"),
        ("eagle3", {"draft_vocab_size": 41}, "draft_vocab_size is 41 .* 40"),
        ("eagle3", {"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ("eagle3", {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}}, r"\[1, 2\].* 7 that"),
        ("eagle3", {"eagle_aux_hidden_state_layer_ids": [1, 2, 8]}, r"\[1, 2, 8\].* 7 that"),
    ],
)
def test_eagle_config_errors(
    tmp_path: Path, target: LoadedModel, kind: str, changes: dict[str, Any], message: str
) -> None:
    """One error that names both sizes."""
    raw = eagle_raw(TARGET_RAW)
    write_checkpoint(tmp_path, raw | changes, eagle_random(raw))
    with pytest.raises(UnsupportedModelError, match=message):
        load_eagle(tmp_path, kind, target.config, target.params, FLOAT32)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fc.weight", np.zeros((12, 24), np.float32), r"fc.weight is \[12, 24\], expected \[12, 36\]"),
        ("lm_head.weight", None, r"no lm_head.weight, and its draft_vocab_size \(15\) .*\(40\)"),
        ("d2t", None, "no d2t"),
        ("d2t", np.full(15, 39), "d2t does not name 15 different tokens of 40"),
        ("t2d", np.zeros(40, bool), "t2d .* does not mark"),
        ("midlayer.hidden_norm.weight", None, "hidden_norm.weight is missing"),
        ("mask_hidden", np.zeros(36, np.float32), "mask_hidden .* is not expected"),
    ],
)
def test_eagle3_weight_errors(
    tmp_path: Path, target: LoadedModel, name: str, value: np.ndarray | None, message: str
) -> None:
    """Tensors that do not fit."""
    raw = eagle_raw(TARGET_RAW, draft_vocab_size=15)
    tensors = eagle3_random(raw, 12) | {name: value}
    write_checkpoint(tmp_path, raw, {key: tensor for key, tensor in tensors.items() if tensor is not None})
    with pytest.raises(WeightsError, match=message):
        load_eagle(tmp_path, "eagle3", target.config, target.params, FLOAT32)


def test_target_of_few_layers_has_no_default_taps(tmp_path: Path) -> None:
    """The authors' choice needs seven layers."""
    raw = tiny_config()
    small = load_model(write_checkpoint(tmp_path / "target", raw, random_tensors(raw)))
    params: Params = small.params
    head = eagle_raw(raw)
    write_checkpoint(tmp_path / "head", head, eagle3_random(head, 12))
    with pytest.raises(UnsupportedModelError, match=r"\[2, 1, -1\] \(the default\).* 2 that"):
        load_eagle(tmp_path / "head", "eagle3", small.config, params, FLOAT32)
