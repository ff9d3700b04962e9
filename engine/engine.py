"""`Engine`: prompts in, completions out, from Python. Named after, and used like, vLLM's `LLM`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from rich.progress import Progress

from engine.beam_search import beam_search
from engine.builder import build_engine
from engine.built import BuiltEngine
from engine.config import EngineConfig
from engine.errors import EngineDeadError, InvalidRequestError, RequestFailedError
from engine.input_processor import Prompt
from engine.outputs import BeamSearchOutput, EmbeddingOutput, RequestOutput
from engine.pooling import Pooling, PoolingParams
from engine.requests.request import Request
from engine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

Messages = Sequence[Mapping[str, Any]]


class Engine:
    """An LLM with its scheduler, KV cache and executables.

    Args:
        model: directory, .gguf file, hub id, or "demo" (SmolLM2-135M-Instruct).
        **settings: any field of the parts of `EngineConfig` (`dtype="float32"`, `max_model_len=512`, `block_size=32`
            …).

    Raises:
        QuireError: of the kind that fits; see `build_engine`.

    Example:
        >>> with Engine("demo") as engine:
        ...     print(engine.generate("The capital of France is")[0].outputs[0].text)
    """

    def __init__(self, model: str = "demo", **settings: Any) -> None:
        self.config = EngineConfig.from_flat(model=model, **settings)
        self._built: BuiltEngine | None = build_engine(self.config)
        self._lock = threading.RLock()
        self._mail: dict[str, deque[RequestOutput]] = {}

    # generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; all of them run together.

        Args:
            prompts: one prompt or a list: text, token ids, or mappings (see `Prompt`). A flat list of ints is one
                prompt.
            sampling_params: one for all, or one per prompt; default: `get_default_sampling_params()`.
            use_tqdm: show a progress bar.
            priority: per prompt, lower first; needs `scheduling_policy="priority"`.

        Returns:
            One output per prompt, in order. A request whose step failed has finish reason "error" and its `error` set.

        Raises:
            InvalidRequestError: a prompt or parameter is invalid; then nothing was started.
        """
        requests = self._make_requests(_prompt_list(prompts), sampling_params, priority)
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, with the model's chat template."""
        if not isinstance(messages, (list, tuple)) or not messages:
            raise InvalidRequestError(
                f"messages must be a non-empty list of messages, or a list of such lists, got {messages!r}.", "messages"
            )
        conversations: list[Messages] = [messages] if isinstance(messages[0], Mapping) else list(messages)  # type: ignore[list-item]
        prompts: list[Prompt] = [
            self.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **dict(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[RequestOutput]:
        """Complete one prompt, yielding what is new after each step. Closing the iterator aborts the request.

        Raises:
            InvalidRequestError: as in `generate`.
            RequestFailedError: a step failed.
        """
        [request] = self._make_requests([prompt], params, None, RequestOutputKind.DELTA)
        mail = self._add(request)
        try:
            while True:
                while not mail:
                    self._pump()
                output = mail.popleft()
                if output.error is not None:
                    raise RequestFailedError(output.error)
                yield output
                if output.finished:
                    return
        finally:
            self._drop([request])

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        use_tqdm: bool = False,
    ) -> list[EmbeddingOutput]:
        """The pooled hidden states of prompts, after the final norm; all of them run together.

        Args:
            prompts: as in `generate`; a prompt may have `max_model_len` tokens.
            pooling: "last" token's, or the "mean" over the prompt.
            normalize: divide by the L2 norm.
            use_tqdm: show a progress bar.

        Returns:
            One embedding per prompt, in order.

        Raises:
            InvalidRequestError: a prompt or parameter is invalid; then nothing was started.
            RequestFailedError: a step failed.
        """
        params = PoolingParams(pooling, normalize)
        requests = [self._parts.inputs.make_pooled(prompt, params) for prompt in _prompt_list(prompts)]
        return [EmbeddingOutput.of(output) for output in self._run(requests, use_tqdm)]

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The `beam_width` most probable completions of each prompt."""
        requests = self._make_requests(_prompt_list(prompts), SamplingParams(max_tokens=params.max_tokens), None)
        return [
            beam_search(request, params, self._parts.model.eos_token_ids, self._parts.tokenizer, self._run_quietly)
            for request in requests
        ]

    def abort(self, request_id: str) -> bool:
        """End a live request with finish reason "abort". False if it is not live."""
        with self._lock:
            return self._core.abort(request_id)

    # looking inside

    def get_tokenizer(self) -> Any:
        """The tokenizer; None with `skip_tokenizer_init`."""
        return self._parts.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request gets that brings no parameters: as the model's `generation_config.json` recommends."""
        return self._parts.default_sampling

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation.

        Raises:
            InvalidRequestError: no tokenizer, no chat template, or the template refuses the messages.
        """
        tokenizer = self._parts.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("chat needs a tokenizer; this engine has none (skip_tokenizer_init).", "messages")
        text = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )
        return tokenizer.encode(text, add_special_tokens=False)

    def describe(self) -> dict[str, Any]:
        """Device, dtype, implementations, sizes, memory ledger, start-up times."""
        return self._parts.describe()

    def metrics(self) -> dict[str, Any]:
        """Counters and gauges of this moment; `compiles_after_ready` must be 0."""
        with self._lock:
            return self._parts.snapshot()

    def wait_until_compiled(self) -> None:
        """Return when every executable is there: at once, unless `compile_in_background` is set. A measurement that
        begins before measures the compiler as well.
        """
        self._parts.parts.executables.wait_for_all()

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes; running requests go on."""
        with self._lock:
            self._core.scheduler.reset_prefix_cache()

    # lifetime

    def shutdown(self) -> None:
        """Free the device. Further calls raise EngineDeadError."""
        if self._built is not None:
            self._built.close()
        self._built = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # the loop

    @property
    def _parts(self) -> BuiltEngine:
        if self._built is None:
            raise EngineDeadError("the engine was shut down.")
        return self._built

    @property
    def _core(self) -> Any:
        return self._parts.core

    def _make_requests(
        self,
        prompts: list[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
    ) -> list[Request]:
        every = self._parts.default_sampling if params is None else params
        per_prompt = [every] * len(prompts) if isinstance(every, SamplingParams) else _params_list(every)
        if len(per_prompt) != len(prompts):
            raise InvalidRequestError(
                f"there are {len(prompts)} prompts but {len(per_prompt)} sampling_params.", "sampling_params"
            )
        if priority is not None and len(priority) != len(prompts):
            raise InvalidRequestError(f"there are {len(prompts)} prompts but {len(priority)} priorities.", "priority")
        if priority is not None and self.config.scheduler.scheduling_policy != "priority":
            raise InvalidRequestError("priority needs scheduling_policy='priority'.", "priority")
        make = self._parts.inputs.make
        requests = [
            make(
                prompt,
                p.replace(output_kind=output_kind),
                priority=0 if priority is None else priority[index],
            )
            for index, (prompt, p) in enumerate(zip(prompts, per_prompt, strict=True))
        ]
        if self._core.grammars is not None:
            self._core.grammars.prepare(r.params.structured_outputs for r in requests)
        return requests

    def _add(self, request: Request) -> deque[RequestOutput]:
        with self._lock:
            self._core.add(request)
            return self._mail.setdefault(request.request_id, deque())

    def _pump(self) -> None:
        """One step of the core. Each output goes to the mailbox of whoever waits for it: streams may interleave."""
        with self._lock:
            for output in self._core.step():
                mail = self._mail.get(output.request_id)
                if mail is not None:
                    mail.append(output)

    def _drop(self, requests: Sequence[Request]) -> None:
        """Forget requests; those still live are aborted."""
        with self._lock:
            for request in requests:
                self._mail.pop(request.request_id, None)
                if self._built is not None:
                    self._core.abort(request.request_id)

    def _run_quietly(self, requests: list[Request]) -> list[RequestOutput]:
        return self._run(requests, use_tqdm=False)

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        with Progress(disable=not use_tqdm) as bars:
            task = bars.add_task("requests", total=len(requests))
            added: list[tuple[Request, deque[RequestOutput]]] = []
            try:
                for request in requests:
                    added.append((request, self._add(request)))
                while not all(mail for _, mail in added):
                    self._pump()
                    bars.update(task, completed=sum(bool(mail) for _, mail in added))
                return [mail[0] for _, mail in added]
            finally:
                self._drop([request for request, _ in added])


def _prompt_list(prompts: Any) -> list[Prompt]:
    """One prompt or many: text, a mapping and a flat list of ints are one."""
    if isinstance(prompts, (str, bytes, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise InvalidRequestError(
            f"prompts must be text, token ids, a mapping or a list of these, got {prompts!r}.", "prompt"
        )
    prompts = list(prompts)
    if not prompts:
        raise InvalidRequestError("the list of prompts must not be empty.", "prompt")
    return [prompts] if all(isinstance(p, (int, np.integer)) for p in prompts) else prompts


def _params_list(params: Any) -> list[SamplingParams]:
    if not isinstance(params, (list, tuple)) or not all(isinstance(p, SamplingParams) for p in params):
        raise InvalidRequestError(
            f"sampling_params must be one SamplingParams, or a list of one per prompt, got {params!r}.",
            "sampling_params",
        )
    return list(params)
