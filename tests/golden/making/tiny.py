"""Builds the tiny models, saves them as checkpoints, and measures them as they load back from disk.

Weights are large on purpose: a wrong rotary table, norm weight or bias moves the log-probabilities by far more than
float32 noise. Each wrong reading listed in the spec is tried, and the maker refuses a model that would not notice it.
"""

import copy
import datetime
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .files import provenance, write_json, write_npz
from .measure import Measured, cache_noise, forward, greedy_uncached, measure, token_logprobs
from .specs import SPECS, VOCAB_SIZE, TinySpec, WrongReading
from .tiny_tokenizer import write_tokenizer

SEED = 20261121
PROMPT_LENGTHS = (1, 5, 17, 40, 70)
CONTINUATION_LENGTH = 32
MIN_GAP = 0.01
MIN_DISTINCT = 8
MIN_SENSITIVITY = 0.02
MAX_ATTEMPTS = 200
GRID = 64
SHARD_SIZE = "200KB"
FIRST_ORDINARY_ID = 3


def _rng(*keys: str | int) -> np.random.Generator:
    """A generator that depends on the names only, not on the order of calls."""
    return np.random.default_rng([SEED, *(zlib.crc32(str(key).encode()) for key in keys)])


def _draw(name: str, shape: tuple[int, ...], tied: bool, rng: np.random.Generator) -> np.ndarray:
    """Random values for one parameter; the spread depends on its role."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return rng.uniform(0.6, 2.0, shape)
    if name.endswith("norm.weight"):
        return rng.uniform(0.4, 1.6, shape)
    if name.endswith(".bias"):
        return rng.normal(0.0, 0.3, shape)
    if name.endswith("embed_tokens.weight"):
        return rng.normal(0.0, 0.25 if tied else 0.4, shape)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return rng.normal(0.0, 0.15, shape)
    return rng.normal(0.0, 0.2, shape)


@torch.no_grad()
def _fill_weights(model: PreTrainedModel, spec: TinySpec) -> None:
    """Replace every parameter by values that depend on the seed, the model's name and the parameter's name."""
    for name, parameter in model.named_parameters():
        values = _draw(name, tuple(parameter.shape), model.config.tie_word_embeddings, _rng(spec.name, name))
        if spec.on_grid:
            values = np.clip(np.round(values * GRID), -256, 256) / GRID
        parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def _config(spec: TinySpec) -> PreTrainedConfig:
    return AutoConfig.for_model(spec.model_type, **copy.deepcopy(dict(spec.config)))


def _save(spec: TinySpec, directory: Path) -> None:
    """Write the checkpoint as save_pretrained does (and, for the old dialect, rewrite its config.json)."""
    config = _config(spec)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill_weights(model, spec)
    model.save_pretrained(directory)
    _make_readable(directory)
    if spec.old_dialect:
        write_json(directory / "config.json", _old_dialect(directory / "config.json"))


def _make_readable(directory: Path) -> None:
    """Give the weight files the usual mode: safetensors writes them for their owner only."""
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)


def _old_dialect(path: Path) -> dict[str, Any]:
    """Translate a llama config.json to what transformers 4.40 wrote."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    for key in ("dtype", "head_dim"):
        config.pop(key)
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    config["torch_dtype"] = "float32"
    config["transformers_version"] = "4.40.0"
    return dict(sorted(config.items()))


def _load(directory: Path) -> PreTrainedModel:
    """Load a checkpoint the way the golden values are defined: float32, eager attention."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def _misread(model: PreTrainedModel, spec: TinySpec, wrong: WrongReading) -> PreTrainedModel:
    """The same weights under one wrong reading."""
    config = AutoConfig.for_model(spec.model_type, **copy.deepcopy(dict(spec.config) | dict(wrong.config)))
    other = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for end, value in wrong.fill.items():
            matching = [parameter for name, parameter in other.named_parameters() if name.endswith(end)]
            if not matching:
                raise ValueError(f"{spec.name}: no parameter ends with {end}")
            for parameter in matching:
                parameter.fill_(value)
    return other


def _sensitivity(model: PreTrainedModel, spec: TinySpec, measured: Measured) -> dict[str, float]:
    """Largest logprob change over the longest sequence for each wrong reading; refuses a model that does not notice."""
    tokens = [*measured.prompt, *measured.continuation]
    changes = {}
    for name, wrong in spec.wrong.items():
        logprobs = token_logprobs(forward(_misread(model, spec, wrong), tokens), tokens)
        changes[name] = round(float(np.abs(logprobs - measured.logprobs).max()), 4)
    unnoticed = {name: change for name, change in changes.items() if change < MIN_SENSITIVITY}
    if unnoticed:
        raise ValueError(f"{spec.name} would not notice {unnoticed}")
    return changes


def _find_prompt(model: PreTrainedModel, name: str, length: int) -> tuple[Measured, int]:
    """The first random prompt of this length whose continuation is varied and decided by clear margins."""
    for attempt in range(MAX_ATTEMPTS):
        ids = _rng(name, "prompt", length, attempt).integers(FIRST_ORDINARY_ID, VOCAB_SIZE, length).tolist()
        continuation = greedy_uncached(model, ids, CONTINUATION_LENGTH)
        measured = measure(model, ids, continuation)
        if len(set(continuation)) >= MIN_DISTINCT and measured.min_gap >= MIN_GAP:
            return measured, attempt
    raise ValueError(f"{name}: no good prompt of length {length}")


def _rope_table(model: PreTrainedModel) -> dict[str, Any]:
    rotary = model.model.rotary_emb
    return {"inv_freq": rotary.inv_freq.tolist(), "attention_scaling": float(rotary.attention_scaling)}


def _describe_prompt(measured: Measured, attempt: int) -> dict[str, Any]:
    return {
        "length": len(measured.prompt),
        "attempt": attempt,
        "min_gap": round(measured.min_gap, 5),
        "min_gap_step": measured.min_gap_step,
        "distinct_tokens": len(set(measured.continuation)),
        "prompt": measured.prompt,
        "continuation": measured.continuation,
    }


def _arrays(measured: list[Measured]) -> dict[str, np.ndarray]:
    arrays = {}
    for index, one in enumerate(measured):
        arrays[f"prompt_{index}"] = np.array(one.prompt, dtype=np.int32)
        arrays[f"continuation_{index}"] = np.array(one.continuation, dtype=np.int32)
        arrays[f"logprobs_{index}"] = one.logprobs
        arrays[f"last_prompt_logits_{index}"] = one.last_prompt_logits
    return arrays


def _make_model(spec: TinySpec, directory: Path, date: datetime.date) -> None:
    """Make one folder: checkpoint, golden.json, golden.npz."""
    _save(spec, directory)
    model = _load(directory)
    found = [_find_prompt(model, spec.name, length) for length in PROMPT_LENGTHS]
    measured = [one for one, _ in found]
    noise = max(cache_noise(model, one) for one in measured)
    golden = {
        "model": spec.name,
        "covers": spec.covers,
        "provenance": provenance(SEED, date),
        "arrays": "golden.npz",
        "rope": _rope_table(model),
        "cached_decode_noise": noise,
        "wrong_readings_change_logprobs_by": _sensitivity(model, spec, measured[-1]),
        "prompts": [_describe_prompt(one, attempt) for one, attempt in found],
    }
    write_json(directory / "golden.json", golden)
    write_npz(directory / "golden.npz", _arrays(measured))
    smallest = min(one.min_gap for one in measured)
    print(f"{spec.name:20} min gap {smallest:.4f}  noise {noise:.1e}  {golden['wrong_readings_change_logprobs_by']}")


def _make_sharded(source: Path, directory: Path) -> None:
    """Save the weights of `source` again in several shards; its golden values are those of `source`."""
    _load(source).save_pretrained(directory, max_shard_size=SHARD_SIZE)
    _make_readable(directory)
    num_shards = len(list(directory.glob("model-*.safetensors")))
    if num_shards < 3:
        raise ValueError(f"only {num_shards} shards")
    golden = {
        "model": directory.name,
        "covers": "the weights of llama in several shards with an index",
        "golden_of": source.name,
    }
    write_json(directory / "golden.json", golden)


def make_tiny(root: Path, date: datetime.date, only: list[str] | None = None) -> None:
    """Make `root`/<name>/ for every spec (or those named in `only`)."""
    torch.set_num_threads(1)
    for spec in SPECS:
        if only and spec.name not in only:
            continue
        directory = root / spec.name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        _make_model(spec, directory, date)
        if spec.name == "llama":
            write_tokenizer(directory)
            shutil.rmtree(root / "llama_sharded", ignore_errors=True)
            _make_sharded(directory, root / "llama_sharded")
