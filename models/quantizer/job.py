"""`quantize_model`: a model's layers one after another, with one layer and the calibration's activations in memory.

The checkpoint appears whole, when all is done; until then it is a `PartialJob`, which goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from models.config import ModelConfig
from models.errors import WeightsError
from models.families.tensors import Assembly
from models.loading.load import Checkpoint, choose_format, open_checkpoint
from models.loading.orbax import COPIED_FILES
from models.loading.source import Progress, TensorSource
from models.parameters import layer_parameter_shapes
from models.quantizer.blocks import BlockProblem, BlockResult, BlockRunner, Projection, gram_of, output_error, with_part
from models.quantizer.methods import autoround, awq, gptq, rtn
from models.quantizer.partial import LayerReport, PartialJob
from models.quantizer.types import Settings, SettingsError
from models.quantizer.writers import formats

METHODS: Mapping[str, Callable[[BlockProblem, Settings], BlockResult]] = {
    "rtn": rtn.quantize_block,
    "gptq": gptq.quantize_block,
    "awq": awq.quantize_block,
    "autoround": autoround.quantize_block,
}
_DTYPES = {"float32": ml_dtypes.bfloat16, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_SHARD_BYTES = 4 << 30
_AT_A_TIME = 8  # sequences whose activations a forward pass holds


def quantize_model(
    path: Path, out: Path, settings: Settings, windows: np.ndarray, progress: Progress | None = None
) -> tuple[LayerReport, ...]:
    """Quantize the matrices of a model's layers and write a checkpoint; of a GGUF file, without tokenizer.

    Args:
        path: a directory with safetensors, or a GGUF file.
        out: a directory that does not exist.
        settings: how.
        windows: int32[S, L], token ids to calibrate with.
        progress: called after each layer with layers done, their number, and a name.

    Raises:
        SettingsError: the model's sizes do not fit the settings, or an unfinished job is another one.
        WeightsError: `out` exists, or the model's files are damaged.
        UnsupportedModelError, ModelNotFoundError: as `load_model`.
    """
    if out.exists():
        raise WeightsError(f"{out} exists already; name a new directory or remove it first.")
    checkpoint = open_checkpoint(path, choose_format(path, "auto"))
    if checkpoint.weight_format is not None:
        raise SettingsError(f"{path} is quantized already ({checkpoint.weight_format.name}).")
    config, source = checkpoint.config, checkpoint.open_tensors()
    _check_sizes(config, settings)
    partial = PartialJob.open(out, path, settings, windows)
    done = partial.num_done
    if done:
        x, x_full = partial.activations()
    else:
        x = x_full = source.read("model.embed_tokens.weight")[windows].astype(np.float32)
    assemblies = checkpoint.family.assemblies(config)
    reports = [partial.report(index) for index in range(done)]
    for index in range(done, config.num_layers):
        prefix = f"layers.{index}."
        of_layer = {name[len(prefix) :]: each for name, each in assemblies.items() if name.startswith(prefix)}
        layer = _Layer(BlockRunner(config, config.layers[index]), of_layer, settings, _dtype(config))
        errors, block, tensors, x, x_full = layer.quantize(source, x, x_full)
        reports.append(LayerReport(index, errors, block))
        partial.finish_layer(reports[-1], tensors, x, x_full)
        if progress is not None:
            progress(index + 1, config.num_layers, f"layer {index}")
    _write_checkpoint(partial, checkpoint, source, settings, path)
    os.rename(partial.directory, out)
    return tuple(reports)


def _dtype(config: ModelConfig) -> np.dtype:
    """Of what stays as it is, and of activations."""
    return np.dtype(_DTYPES[config.dtype])


def _check_sizes(config: ModelConfig, settings: Settings) -> None:
    for name, shape in layer_parameter_shapes(config).items():
        if len(shape) < 2 or settings.format == "fp8":
            continue
        if settings.group_size > 0 and shape[0] % settings.group_size:
            fits = [str(size) for size in (128, 64, 32) if shape[0] % size == 0]
            raise SettingsError(
                f"group_size={settings.group_size} does not divide the {shape[0]} inputs of {name}; "
                f"{', '.join([*fits, '-1'])} would."
            )
        if (shape[0] * settings.bits) % 32:
            raise SettingsError(f"{shape[0]} inputs of {name} do not fill whole words of {settings.bits}-bit numbers.")


class _Layer:
    """One layer on its way."""

    def __init__(
        self, runner: BlockRunner, assemblies: Mapping[str, Assembly], settings: Settings, dtype: np.dtype
    ) -> None:
        self.runner, self.assemblies, self.settings, self.dtype = runner, assemblies, settings, dtype
        self.projections = tuple(p for name, assembly in assemblies.items() for p in _projections(name, assembly))

    def quantize(
        self, source: TensorSource, x: np.ndarray, x_full: np.ndarray
    ) -> tuple[dict[str, float], float, dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Errors of modules and of the block, tensors, and the activations behind the layer."""
        weights = {name: jnp.asarray(_read(assembly, source)) for name, assembly in self.assemblies.items()}
        scale_dtype = "float16" if self.settings.scale_dtype == "float16" else self.dtype.name
        problem = BlockProblem(self.runner, weights, self.projections, jnp.asarray(x), jnp.asarray(x_full), scale_dtype)
        tensors, made, is_folded = self._make(problem)
        tensors |= self._plain(made)
        # Where scales were folded in, inputs and matrices are others, and cannot be compared one by one.
        errors = {} if is_folded else self._errors(problem, made)
        after, after_full = _advance(self.runner, made, x), _advance(self.runner, weights, x_full)
        block = float(np.sqrt(np.mean((after - after_full) ** 2) / np.mean(after_full**2)))
        return errors, block, tensors, after, after_full

    def _make(self, problem: BlockProblem) -> tuple[dict[str, np.ndarray], dict[str, jax.Array], bool]:
        """Tensors of the matrices, the layer's weights as these say, and whether others changed too."""
        tensors: dict[str, np.ndarray] = {}
        found, changed = METHODS[self.settings.method](problem, self.settings)
        made = {**problem.weights, **changed}
        for projection in self.projections:
            matrix = found[projection.module]
            tensors |= formats.WRITERS[self.settings.format](projection.module, matrix, self.dtype)
            made = with_part(made, projection, jnp.asarray(matrix.values()))
        return tensors, made, bool(changed)

    def _errors(self, problem: BlockProblem, made: Mapping[str, jax.Array]) -> dict[str, float]:
        inputs = self.runner.inputs(problem.weights, problem.x[:_AT_A_TIME])
        grams = {name: gram_of(value) for name, value in inputs.items()}
        return {
            p.module: output_error(problem.part(p), made[f"{p.matrix}.weight"][:, p.start : p.stop].T, grams[p.matrix])
            for p in self.projections
        }

    def _plain(self, made: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        """Norms and biases under their checkpoint names, as they are now."""
        tensors: dict[str, np.ndarray] = {}
        matrices = {f"{projection.matrix}.weight" for projection in self.projections}
        for name, assembly in self.assemblies.items():
            whole, start = np.asarray(made[name]), 0
            for tensor in assembly.sources if name not in matrices else ():
                stop = start + tensor.shape[-1]
                tensors[tensor.name] = np.ascontiguousarray(whole[..., start:stop]).astype(self.dtype)
                start = stop
        return tensors


def _read(assembly: Assembly, source: TensorSource) -> np.ndarray:
    """float32, as the decoder has it."""
    parts = [source.read(tensor.name).astype(np.float32) for tensor in assembly.sources]
    return np.concatenate([part.T if assembly.transpose else part for part in parts], axis=-1)


def _projections(name: str, assembly: Assembly) -> list[Projection]:
    found, start = [], 0
    for tensor in assembly.sources if assembly.transpose else ():
        stop = start + tensor.shape[0]
        found.append(Projection(tensor.name.removesuffix(".weight"), name.removesuffix(".weight"), start, stop))
        start = stop
    return found


def _advance(runner: BlockRunner, weights: Mapping[str, jax.Array], x: np.ndarray) -> np.ndarray:
    parts = [x[start : start + _AT_A_TIME] for start in range(0, len(x), _AT_A_TIME)]
    return np.concatenate([np.asarray(runner.forward(weights, jnp.asarray(part))) for part in parts])


def _write_checkpoint(
    partial: PartialJob, checkpoint: Checkpoint, source: TensorSource, settings: Settings, path: Path
) -> None:
    """Embedding, last norm and head; one file or several with an index; the config, and files beside it."""
    config, dtype = checkpoint.config, _dtype(checkpoint.config)
    rest = {}
    for name, assembly in checkpoint.family.assemblies(config).items():
        if not name.startswith("layers."):
            rest |= {tensor.name: source.read(tensor.name).astype(dtype) for tensor in assembly.sources}
    shards: list[dict[str, np.ndarray]] = [rest]
    for index in range(config.num_layers):
        tensors = partial.tensors(index)
        if _size(shards[-1]) + _size(tensors) > _SHARD_BYTES:
            shards.append({})
        shards[-1] |= tensors
    _write_shards(partial.directory, shards)
    raw: dict[str, Any] = {key: value for key, value in checkpoint.raw.items() if key != "torch_dtype"}
    raw |= {"dtype": dtype.name, "quantization_config": formats.CONFIGS[settings.format](settings)}
    (partial.directory / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    for name in COPIED_FILES if path.is_dir() else ():
        if name != "config.json" and (path / name).is_file():
            shutil.copyfile(path / name, partial.directory / name)
    partial.clean()


def _size(tensors: Mapping[str, np.ndarray]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_shards(directory: Path, shards: Sequence[dict[str, np.ndarray]]) -> None:
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        whole = {name: np.ascontiguousarray(tensor) for name, tensor in shard.items()}
        save_file(whole, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_size, shards))}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
