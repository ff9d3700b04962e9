"""What an unfinished job keeps on the disk, so that it can go on.

OUT.partial/
    job.json                settings and source: a job that goes on must be the same
    layer-00000.safetensors the tensors of each finished layer, as the checkpoint will hold them; with a report
    state-1.safetensors     activations before layer 1, in full precision and quantized
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from models.loading.safetensors import SafetensorsSource, read_header
from models.quantizer.types import Settings, SettingsError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        layer: its index.
        errors: module -> error of its outputs relative to them, on the calibration's inputs.
        block: the same of the whole block, with all that came before.
    """

    layer: int
    errors: dict[str, float]
    block: float


@dataclass(frozen=True)
class PartialJob:
    """The directory of an unfinished job."""

    directory: Path

    @classmethod
    def open(cls, out: Path, source: Path, settings: Settings, windows: np.ndarray) -> PartialJob:
        """Begin a job, or go on with it.

        Raises:
            SettingsError: what is there is of another job.
        """
        job = {
            "settings": asdict(settings),
            "source": str(source.resolve()),
            "tokens": hashlib.sha256(windows.tobytes()).hexdigest(),
        }
        partial = cls(out.with_name(f"{out.name}.partial"))
        file = partial.directory / "job.json"
        if file.is_file():
            if json.loads(file.read_bytes()) != job:
                raise SettingsError(
                    f"{partial.directory} is an unfinished job with other settings, source or text: remove it first."
                )
            logger.info("%s is there: going on with layer %d", partial.directory, partial.num_done)
            return partial
        partial.directory.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(job, indent=1), encoding="utf-8")
        return partial

    @property
    def num_done(self) -> int:
        """Finished layers."""
        return len(list(self.directory.glob("layer-*.json")))

    def layer_file(self, index: int) -> Path:
        """Tensors of a layer."""
        return self.directory / f"layer-{index:05d}.safetensors"

    def tensors(self, index: int) -> dict[str, np.ndarray]:
        """Of a finished layer, by name. (The safetensors package's reader knows no 8-bit floats.)"""
        source = SafetensorsSource(read_header(self.layer_file(index)))
        return {name: source.read(name) for name in source.names()}

    def report(self, index: int) -> LayerReport:
        """Of a finished layer."""
        return LayerReport(**json.loads(self.layer_file(index).with_suffix(".json").read_bytes()))

    def activations(self) -> tuple[np.ndarray, np.ndarray]:
        """Before the next layer, quantized and in full precision."""
        state = load_file(self.directory / f"state-{self.num_done}.safetensors")
        return state["x"], state["x_full"]

    def finish_layer(
        self, report: LayerReport, tensors: dict[str, np.ndarray], x: np.ndarray, x_full: np.ndarray
    ) -> None:
        """Keep a layer. The report comes last: with it, the layer is done."""
        file, index = self.layer_file(report.layer), report.layer
        # The writer takes memory as it lies, whatever the strides say.
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file)
        save_file({"x": x, "x_full": x_full}, self.directory / f"state-{index + 1}.safetensors")
        file.with_suffix(".json").write_text(json.dumps(asdict(report)), encoding="utf-8")
        (self.directory / f"state-{index}.safetensors").unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove all that is no part of the checkpoint."""
        for pattern in ("layer-*", "state-*.safetensors", "job.json"):
            for file in self.directory.glob(pattern):
                file.unlink()
