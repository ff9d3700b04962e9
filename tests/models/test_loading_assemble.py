"""Checkpoint tensors → fused parameters: right values, one error for all faults, bounded host memory."""

import tracemalloc
import weakref
from collections.abc import Collection
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from models.errors import WeightsError
from models.loading import transfer
from models.loading.assemble import assemble
from models.loading.dtypes import SERVING_DTYPES
from models.loading.source import TensorSource
from models.parameters import parameter_shapes
from tests.models.tiny_checkpoints import expected_parameters, family_of, random_tensors, tiny_config


class DictSource:
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        return self.tensors[name].dtype.name

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


def load(config: dict[str, Any], source: TensorSource, dtype: str = "float32", **rest: Any) -> dict[str, jax.Array]:
    family = family_of(config)
    return assemble(family, family.translate(config, {}), source, SERVING_DTYPES[dtype], **rest)


ARCHITECTURES = (
    tiny_config("LlamaForCausalLM"),
    tiny_config("LlamaForCausalLM", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    tiny_config("MistralForCausalLM"),
    tiny_config("Qwen2ForCausalLM"),
    tiny_config("Qwen3ForCausalLM"),
    tiny_config("SmolLM3ForCausalLM", num_hidden_layers=4),
)


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config["architectures"][0])
@pytest.mark.parametrize("served", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_values(config: dict, stored: str, served: str) -> None:
    config = config | {"dtype": stored}
    tensors = random_tensors(config)
    params = load(config, DictSource(tensors), served)
    expected = expected_parameters(tensors, config["num_hidden_layers"], tied=config["tie_word_embeddings"])
    shapes = parameter_shapes(family_of(config).translate(config, {}))
    assert {name: array.shape for name, array in params.items()} == shapes
    assert params.keys() == expected.keys()
    for name, array in params.items():
        assert array.dtype == served
        assert np.asarray(array).tobytes() == expected[name].astype(SERVING_DTYPES[served]).tobytes(), name


@pytest.mark.parametrize(
    ("stored", "served"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_values_where_threads_share_the_work(stored: str, served: str) -> None:
    # Sizes that are no multiple of a tile, and matrices above the limit for more than one thread.
    config = tiny_config(hidden_size=667, intermediate_size=1003, vocab_size=1501, num_hidden_layers=1, dtype=stored)
    tensors = random_tensors(config)
    params = load(config, DictSource(tensors), served)
    for name, expected in expected_parameters(tensors, 1, tied=False).items():
        assert np.asarray(params[name]).tobytes() == expected.astype(SERVING_DTYPES[served]).tobytes(), name


def test_progress() -> None:
    config = tiny_config()
    calls: list[tuple[int, int, str]] = []
    params = load(config, DictSource(random_tensors(config)), "bfloat16", progress=lambda *call: calls.append(call))
    total = sum(array.nbytes for array in params.values())
    assert [name for _, _, name in calls] == list(params)
    assert {call[1] for call in calls} == {total}
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[0] == params[calls[0][2]].nbytes
    assert done[-1] == total


Q_PROJ, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"


def test_missing_tensor() -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    del tensors[Q_PROJ]
    with pytest.raises(
        WeightsError, match=r"1 missing\): .*layers\.1\..*q_proj\.weight is missing, expected \[18, 12\]"
    ):
        load(config, DictSource(tensors))


def test_misshapen_tensor() -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    tensors[DOWN] = tensors[DOWN].T
    with pytest.raises(WeightsError, match=r"1 misshapen\): .*down_proj\.weight is \[20, 12\], expected \[12, 20\]\.$"):
        load(config, DictSource(tensors))


def test_unexpected_tensor() -> None:
    config = tiny_config()
    tensors = random_tensors(config) | {"model.layers.0.self_attn.q_proj.bias": np.zeros(18, np.float32)}
    with pytest.raises(WeightsError, match=r"1 unexpected\): .*q_proj\.bias \[18\] is not expected"):
        load(config, DictSource(tensors))


def test_a_layer_too_many_is_an_error() -> None:
    tensors = random_tensors(tiny_config(num_hidden_layers=3))
    with pytest.raises(WeightsError, match=r"9 unexpected\): model\.layers\.2\..*; and 6 more"):
        load(tiny_config(num_hidden_layers=2), DictSource(tensors))


def test_all_faults_are_one_error() -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    for layer in range(2):
        del tensors[f"model.layers.{layer}.input_layernorm.weight"]
        del tensors[f"model.layers.{layer}.post_attention_layernorm.weight"]
    tensors[DOWN] = tensors[DOWN].T
    tensors["visual.weight"] = np.zeros((2, 3), np.float32)
    with pytest.raises(WeightsError) as caught:
        load(config, DictSource(tensors))
    message = str(caught.value)
    assert "4 missing, 1 misshapen, 1 unexpected" in message
    assert f"{DOWN} is [20, 12], expected [12, 20]" in message
    assert "visual.weight [2, 3] is not expected" in message
    assert message.endswith("and 1 more.")


def test_nothing_is_read_before_everything_fits() -> None:
    class Unreadable(DictSource):
        def read(self, name: str) -> np.ndarray:
            raise AssertionError(name)

    with pytest.raises(WeightsError):
        load(tiny_config(num_hidden_layers=3), Unreadable(random_tensors(tiny_config())))


def test_harmless_extras() -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
        "model.rotary_emb.inv_freq": np.ones(3, np.float32),
        "lm_head.weight": tensors["model.embed_tokens.weight"],
    }
    assert "head.weight" not in load(config, DictSource(tensors | extras))


def test_float16_overflow() -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    tensors[Q_PROJ][0, 0] = 1e5
    with pytest.raises(WeightsError, match=rf"{Q_PROJ} holds values that float16 cannot"):
        load(config, DictSource(tensors), "float16")
    assert load(config, DictSource(tensors), "bfloat16")


class CountingSource(DictSource):
    """Makes each tensor when it is asked for, and knows how many bytes of them are alive."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.alive = self.peak = 0

    def names(self) -> Collection[str]:
        return self.shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> str:
        return "float32"

    def read(self, name: str) -> np.ndarray:
        array = np.zeros(self.shapes[name], np.float32)
        self.alive += array.nbytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(array, self._dropped, array.nbytes)
        return array

    def _dropped(self, size_bytes: int) -> None:
        self.alive -= size_bytes


def test_host_memory_is_bounded() -> None:
    config = tiny_config(hidden_size=256, intermediate_size=768, vocab_size=1024, num_hidden_layers=12)
    family = family_of(config)
    sources = [s for a in family.assemblies(family.translate(config, {})).values() for s in a.sources]
    source = CountingSource({s.name: s.shape for s in sources})
    largest = 4 * max(int(np.prod(shape)) for shape in source.shapes.values())
    tracemalloc.start()
    try:
        params = load(config, source)
        # What is on the device may be host memory too on CPU, so count only what is beyond the result.
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    total = sum(array.nbytes for array in params.values())
    assert total > 8 * largest
    assert source.peak <= largest + max(4 * int(np.prod(s)) for s in source.shapes.values())
    assert source.alive == 0
    assert peak - kept < 4 * largest
    assert peak < total + 4 * largest


def test_transfers_run_at_most_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Transfer:
        def __init__(self, host: np.ndarray) -> None:
            self.name = f"{host.shape[0]}"
            events.append(f"start {self.name}")

        def block_until_ready(self) -> None:
            events.append(f"wait {self.name}")

    monkeypatch.setattr(transfer.jax, "device_put", Transfer)
    shapes = {"a": (1,), "b": (2,), "c": (3,)}
    transfer.stream_to_device(shapes, np.dtype(np.float32), lambda name, _: events.append(f"fill {name}"))
    assert events[:7] == ["fill a", "start 1", "fill b", "wait 1", "start 2", "fill c", "wait 2"]


def test_bfloat16_source_stays_exact_in_float32() -> None:
    config = tiny_config(dtype="bfloat16")
    tensors = random_tensors(config)
    params = load(config, DictSource(tensors), "float32")
    back = np.asarray(params["embed.weight"]).astype(ml_dtypes.bfloat16)
    assert back.tobytes() == tensors["model.embed_tokens.weight"].tobytes()
