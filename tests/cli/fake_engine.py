"""An engine without a model, whose outputs and times are set by hand, so that every number can be asserted."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Self

from msgspec import structs

from engine.errors import ContextLengthError, RequestFailedError
from engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from engine.sampling_params import SamplingParams

VOCAB_SIZE = 100
TTFT_S = 0.25
TPOT_S = 0.5
CONTEXT = 64  # longest prompt + output


class FakeEngine:
    """Generates the words `w0 w1 …`, one token each; a token id is a word's number. Notes all that it was asked."""

    def __init__(self, model: str, **settings: Any) -> None:
        self.model = model
        self.settings = settings
        self.is_open = False
        self.calls: list[tuple[list[str | list[int]], list[SamplingParams]]] = []
        self.conversations: list[list[dict[str, str]]] = []
        self.streams_closed = 0
        self.fail_with: str | None = None
        self.lose_tokens = 0
        self.default_sampling = SamplingParams()

    def __enter__(self) -> Self:
        self.is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        assert self.is_open
        one = isinstance(sampling_params, SamplingParams)
        each = [sampling_params] * len(prompts) if one else list(sampling_params)
        self.calls.append((list(prompts), each))
        return [self._finish(i, p, params) for i, (p, params) in enumerate(zip(prompts, each, strict=True))]

    def stream(self, prompt: str | list[int], params: SamplingParams) -> Generator[RequestOutput]:
        assert self.is_open
        self.calls.append(([prompt], [params]))
        whole = self._finish(0, prompt, params)
        try:
            for i, token in enumerate(whole.outputs[0].token_ids):
                last = i + 1 == len(whole.outputs[0].token_ids)
                reason = whole.outputs[0].finish_reason if last else None
                delta = CompletionOutput(0, f"w{token} ", (token,), finish_reason=reason)
                if last and self.fail_with is not None:
                    raise RequestFailedError(self.fail_with)
                yield structs.replace(whole, outputs=[delta], finished=last, metrics=_metrics(i + 1))
        finally:
            self.streams_closed += 1

    def get_default_sampling_params(self) -> SamplingParams:
        return self.default_sampling

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        self.conversations.append(list(messages))
        return [len(message["content"]) % VOCAB_SIZE for message in messages]

    def describe(self) -> dict[str, Any]:
        return {
            "implementations": {"paged_attention": "xla", "matmul": "xla"},
            "device": "cpu",
            "dtype": "float32",
            "vocab_size": VOCAB_SIZE,
        }

    def metrics(self) -> dict[str, Any]:
        return {"compiles_after_ready": 0}

    def _finish(self, index: int, prompt: str | list[int], params: SamplingParams) -> RequestOutput:
        tokens = tuple(range(len(prompt))) if isinstance(prompt, str) else tuple(prompt)
        if len(tokens) >= CONTEXT:
            raise ContextLengthError(f"This model's maximum context length is {CONTEXT} tokens.")
        limit = CONTEXT - len(tokens) if params.max_tokens is None else params.max_tokens
        new = tuple(range(limit - self.lose_tokens))
        logprobs = None if params.logprobs is None else [{t: Logprob(-0.5, 1, f"w{t}")} for t in new]
        outputs = [
            CompletionOutput(i, "".join(f"w{t} " for t in new), new, None, logprobs, "length") for i in range(params.n)
        ]
        return RequestOutput(
            request_id=str(index),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=tokens,
            outputs=outputs,
            finished=True,
            prompt_logprobs=None if params.prompt_logprobs is None else [None, *({} for _ in tokens[1:])],
            metrics=_metrics(len(new)),
            error=self.fail_with,
        )


def _metrics(num_tokens: int) -> RequestMetrics:
    first = 1000.0 + TTFT_S
    return RequestMetrics(1000.0, first_token_ts=first, last_token_ts=first + TPOT_S * (num_tokens - 1))


class FakeFactory:
    """Makes one `FakeEngine` and keeps it for inspection."""

    def __init__(self, **attributes: Any) -> None:
        self.attributes = attributes
        self.engine: FakeEngine | None = None

    def __call__(self, model: str, **settings: Any) -> FakeEngine:
        assert self.engine is None
        self.engine = FakeEngine(model, **settings)
        for name, value in self.attributes.items():
            setattr(self.engine, name, value)
        return self.engine

    @property
    def made(self) -> FakeEngine:
        """The engine, which must have been made and closed again."""
        assert self.engine is not None and not self.engine.is_open
        return self.engine
