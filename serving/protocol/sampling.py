"""The fields that completions and chat share, and how they become `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.errors import InvalidRequestError
from engine.sampling_params import RequestOutputKind, SamplingParams
from engine.structured.params import StructuredOutputsParams
from serving.protocol.base import Missing, RequestBody

# The same name in the API and in SamplingParams.
_SAME_NAMES = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
)

_GUIDED = Missing("use structured_outputs (json, regex, choice, grammar or json_object) or response_format.")
_BEAMS = Missing("there is no beam search over HTTP.", (False,))
_NO_STORE = Missing("nothing is stored here.", (False,))

MISSING: Mapping[str, Missing] = {
    "best_of": Missing("every completion is returned; ask for them with n."),
    "use_beam_search": _BEAMS,
    "early_stopping": _BEAMS,
    "length_penalty": Missing("it belongs to beam search, which there is not over HTTP.", (1, 1.0)),
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "guided_decoding_backend": _GUIDED,
    "guided_whitespace_pattern": _GUIDED,
    "logprob_token_ids": Missing("use logprobs, which gives the most probable tokens."),
    "prompt_embeds": Missing("prompts are text or token ids."),
    "repetition_detection": Missing("use repetition_penalty, or stop."),
    "thinking_token_budget": Missing("use max_tokens."),
    "stream_interval": Missing("each new text is sent at once.", (1,)),
    "vllm_xargs": Missing("there are no plugins to read it."),
    "kv_transfer_params": Missing("KV blocks are not moved between servers."),
    "mm_processor_kwargs": Missing("the models read text only."),
    "store": _NO_STORE,
    "service_tier": Missing("there is one tier.", ("auto", "default")),
}


class StreamOptions(BaseModel):
    """What else a stream carries.

    Attributes:
        include_usage: a last chunk with the usage of the whole request.
        continuous_usage_stats: the usage so far in every chunk; needs include_usage.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(BaseModel):
    """A named schema. `schema` is JSON Schema; without it any JSON object will do."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's way to ask for structured output."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's way to ask for structured output: exactly one of the first six."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None

    def given(self) -> dict[str, Any]:
        """The fields that were set, by their name in the API."""
        return self.model_dump(by_alias=True, exclude_none=True)


class SamplingFields(RequestBody):
    """Fields of both completions and chat. None = as the model's authors recommend, or vLLM's default."""

    MISSING: ClassVar[Mapping[str, Missing]] = MISSING

    model: str | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # Labels of OpenAI's, without effect on the answer there as here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def includes_usage(self) -> bool:
        """True if a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """True if every chunk of a stream carries the usage so far."""
        return self.includes_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check_stream(self) -> None:
        """Check what must not be together with, or without, `stream`.

        Raises:
            InvalidRequestError: stream_options without stream, or prompt_logprobs with it.
        """
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options may only be set when stream is true.", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs is not available when stream is true.", "prompt_logprobs")

    @property
    def output_room(self) -> int:
        """Positions that the output needs at least."""
        return max(1, self.max_tokens or 1)

    def sampling_params(
        self, defaults: SamplingParams, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The parameters of one generation: what the request says over `defaults`.

        Raises:
            InvalidRequestError: a value is out of range.
        """
        given = {name: value for name in _SAME_NAMES if (value := getattr(self, name)) is not None}
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        if (structured := self.structured()) is not None:
            given["structured_outputs"] = StructuredOutputsParams(**structured)
        return defaults.replace(
            **given, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, output_kind=kind
        )

    def structured(self) -> dict[str, Any] | None:
        """The structured output that is asked for, as fields of `StructuredOutputsParams`; None = free text.

        Raises:
            InvalidRequestError: both ways to ask are used, or response_format lacks its schema.
        """
        wanted = _from_response_format(self.response_format)
        if self.structured_outputs is None:
            return wanted
        if wanted is not None:
            raise InvalidRequestError(
                "response_format and structured_outputs exclude each other.", "structured_outputs"
            )
        return self.structured_outputs.given()


def _from_response_format(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.type == "structural_tag":
        return {"structural_tag": wanted.model_extra or {}}
    if wanted.json_schema is None:
        raise InvalidRequestError("response_format of type json_schema needs json_schema.", "response_format")
    schema = wanted.json_schema.json_schema
    return {"json_object": True} if schema is None else {"json": schema}
