"""What the commands need of an engine (`EngineLike`), and the one place that loads the real one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from engine.client import EngineClient
from engine.config import EngineConfig
from engine.distilling import DistillReport
from engine.evaluation import EvaluationReport
from engine.outputs import RequestOutput
from engine.planning.report import CapacityPlan
from engine.quantizing import QuantizationReport, Settings
from engine.replay.report import ReplayReport
from engine.runtime.progress import Report
from engine.sampling_params import SamplingParams

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


class EngineLike(Protocol):
    """The part of `engine.Engine` that the commands use; tests bring a small one of their own."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        *,
        use_tqdm: bool = ...,
    ) -> list[RequestOutput]:
        """Run all prompts as one batch, with one `SamplingParams` for all or one each; outputs in prompt order."""
        ...

    def stream(self, prompt: str | list[int], params: SamplingParams) -> Generator[RequestOutput]:
        """Yield what is new of one request, until `finished`; closing the generator aborts the request.

        Raises:
            InvalidRequestError: the request is refused.
            RequestFailedError: a step failed.
        """
        ...

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's authors recommend where the user says nothing."""
        ...

    def apply_chat_template(self, messages: list[Message]) -> list[int]:
        """The token ids of a conversation, up to where the assistant's next answer begins."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What runs. Read here: `implementations` (operation → name), `device`, `dtype`, `vocab_size`."""
        ...

    def metrics(self) -> Mapping[str, Any]:
        """Counters since the start. They go into benchmark results as they are."""
        ...


class EngineFactory(Protocol):
    """Makes an engine from a model reference and flat settings (`EngineConfig.from_flat`)."""

    def __call__(self, model: str, **settings: Any) -> EngineLike: ...


class ClientFactory(Protocol):
    """Makes the engine of a server, inside the event loop that will use it."""

    async def __call__(self, model: str, *, process: bool, **settings: Any) -> EngineClient:
        """Load a model; ready when it returns.

        Args:
            model, **settings: as `EngineFactory`.
            process: run it in a process of its own.
        """
        ...


# Writes the model of a configuration into a folder that does not exist yet, reporting how far it is.
ModelConverter = Callable[[EngineConfig, Path, Report], None]

# Writes the bundle of a configuration into a folder that does not exist yet, reporting how far it is.
BundleCompiler = Callable[[EngineConfig, Path, Report], None]

# Measures a model, beside a reference if there is one, on a text (None = the one that comes with Quire) in windows.
ModelEvaluator = Callable[[EngineConfig, EngineConfig | None, str | None, int, Report], EvaluationReport]
# Finds layers with which a model can draft for itself: (model, text, tokens of it, progress) -> report.
DraftDistiller = Callable[[EngineConfig, str | None, int, Report], DistillReport]
# Plans an engine: (config, device, bytes of its memory, lengths of sequences, progress) -> plan.
ModelPlanner = Callable[[EngineConfig, str, int | None, list[int] | None, Report], CapacityPlan]
# Writes a quantized checkpoint: (model, out, settings, calibration text, whether to measure it, progress) -> report.
ModelQuantizer = Callable[[EngineConfig, Path, Settings, str | None, bool, Report], QuantizationReport]
# Does again what a recording says, with some settings changed: (recording, changes) -> report.
RecordingPlayer = Callable[[Path, Mapping[str, Any]], ReplayReport]


def create_engine(model: str, **settings: Any) -> EngineLike:
    """Load a model and make it ready to serve."""
    # Imported late on purpose: this import loads jax, which takes longer than `--help` or a wrong flag may take.
    from engine import Engine

    return Engine(model, **settings)


async def create_client(model: str, *, process: bool, **settings: Any) -> EngineClient:
    """Load a model for a server, in a process of its own or in a thread of this one."""
    # Imported late on purpose, as in `create_engine`.
    if process:
        from engine.remote.client import RemoteEngine

        return await RemoteEngine.start(model, **settings)
    from engine.async_engine import AsyncEngine

    return await asyncio.to_thread(AsyncEngine, model, **settings)


def convert_model(config: EngineConfig, out: Path, progress: Report) -> None:
    """Write the model of `config` to the folder `out`, with fused, ready-to-serve weights."""
    # Imported late on purpose, as in `create_engine`.
    from engine.convert import convert_model as convert

    convert(config, out, progress)


def compile_bundle(config: EngineConfig, out: Path, progress: Report) -> None:
    """Write the model of `config` to the folder `out`, compiled ahead."""
    # Imported late on purpose, as in `create_engine`.
    from engine.bundle.write import compile_bundle as write

    write(config, out, progress)


def quantize_model(
    config: EngineConfig, out: Path, settings: Settings, text: str | None, evaluate: bool, progress: Report
) -> QuantizationReport:
    """Write a quantized checkpoint of the model of `config` to `out`."""
    # Imported late on purpose, as in `create_engine`.
    from engine.quantize import quantize

    return quantize(config, out, settings, text, evaluate=evaluate, progress=progress)


def evaluate_model(
    config: EngineConfig, reference: EngineConfig | None, text: str | None, window: int, progress: Report
) -> EvaluationReport:
    """Measure the model of `config`, and how its predictions differ from the reference's."""
    # Imported late on purpose, as in `create_engine`.
    from engine.evaluate import evaluate_model as evaluate

    return evaluate(config, reference, text, window, progress)


def plan_model(
    config: EngineConfig, device: str, memory: int | None, lengths: list[int] | None, progress: Report
) -> CapacityPlan:
    """Plan an engine of the model of `config`: what fits, and the least time of its steps."""
    # Imported late on purpose, as in `create_engine`.
    from engine.planning.plan import make_plan

    return make_plan(config, device, memory, lengths, progress)


def distill_draft(config: EngineConfig, text: str | None, num_tokens: int, progress: Report) -> DistillReport:
    """Find the layers with which the model of `config` can draft for itself."""
    # Imported late on purpose, as in `create_engine`.
    from engine.distill import distill_draft as distill

    return distill(config, text, num_tokens, progress)


def replay_recording(path: Path, changes: Mapping[str, Any]) -> ReplayReport:
    """Do again what a recording says, up to the first difference."""
    # Imported late on purpose, as in `create_engine`.
    from engine.replay.player import replay

    return replay(path, changes)
