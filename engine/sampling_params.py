"""What a user asks of one generation: `SamplingParams`, validated once, with vLLM's field names and defaults."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

from engine.errors import InvalidRequestError
from engine.structured.params import StructuredOutputsParams

MAX_N = 16384
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
SWITCHES = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "skip_reading_prefix_cache",
)
GREEDY_TEMPERATURE = 1e-5  # below this the distribution is a point for float32: argmax
MIN_TEMPERATURE = 1e-2  # temperatures between the two are raised to this, so that logits / temperature stays finite


# Fields of a model's generation_config.json -> what they are here. As in vLLM, `do_sample` is not one of them.
GENERATION_FIELDS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


class RequestOutputKind(enum.Enum):
    """What each output of a stream carries: everything so far, only what is new, or one output at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def _refuse(parameter: str, message: str) -> None:
    raise InvalidRequestError(f"{parameter} {message}", parameter=parameter)


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    # isfinite refuses integers too large for a float; those are finite, and out of most ranges.
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not finite:
        _refuse(name, f"must be a finite number, got {value!r}.")
    if value < low or value > high or (open_low and value == low):
        left = "(" if open_low else "["
        _refuse(name, f"must be in {left}{low:g}, {high:g}], got {value!r}.")


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(name, f"must be an integer, got {value!r}.")
    if value < low or (high is not None and value > high):
        upper = f" and at most {high}" if high is not None else ""
        _refuse(name, f"must be at least {low}{upper}, got {value!r}.")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        _refuse(name, f"must be True or False, got {value!r}.")


def _items(name: str, value: Any) -> tuple[Any, ...]:
    """A list as a tuple; None as the empty one. One string is no list of strings: it would fall into characters."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        _refuse(name, f"must be a list, got {value!r}.")
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of one generation.

    Names, defaults and ranges are vLLM's `SamplingParams`. Logits are processed in this order: structured_outputs;
    allowed_token_ids, logit_bias and min_tokens; penalties (repetition, frequency, presence); bad_words; temperature;
    min_p; top_k; top_p; then Gumbel sampling with a key of (seed, position), so that a request's samples never depend
    on its batch mates.

    structured_outputs forbids tokens before everything else, so logprobs are, as in vLLM, of what the grammar allows;
    tokens that it forbids are not among the candidates. A completion ends with reason "stop" as soon as nothing may
    follow in its grammar, whatever ignore_eos and min_tokens say; before that ignore_eos keeps it going. stop and
    stop_token_ids end it wherever they appear, complete or not. If a grammar, allowed_token_ids and bad_words together
    leave no token, the request ends with an error.

    Raises:
        InvalidRequestError: on construction, if any field is out of range. Fields that need the vocabulary (token ids)
            are checked by the engine with `check_vocabulary`.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | tuple[int, ...] | None = None
    bad_words: list[str] | tuple[str, ...] | None = None
    skip_reading_prefix_cache: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._normalise()
        _integer("n", self.n, 1, MAX_N)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, -1)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", f"must be at most max_tokens={self.max_tokens}, got {self.min_tokens}.")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), -1)
        if self.n > 1 and self.is_greedy:
            _refuse("n", f"must be 1 with greedy sampling (temperature=0), got {self.n}.")
        for name in SWITCHES:
            _boolean(name, getattr(self, name))
        if not isinstance(self.output_kind, RequestOutputKind):
            _refuse("output_kind", f"must be a RequestOutputKind, got {self.output_kind!r}.")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            _refuse("structured_outputs", f"must be StructuredOutputsParams, got {self.structured_outputs!r}.")
        self._check_lists()

    def _normalise(self) -> None:
        """Bring the spellings a user may use (one string, lists, None) to tuples, once."""
        put = object.__setattr__
        put(self, "stop", (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop))
        put(self, "stop_token_ids", _items("stop_token_ids", self.stop_token_ids))
        put(self, "bad_words", _items("bad_words", self.bad_words))
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", _items("allowed_token_ids", self.allowed_token_ids))
        if self.logit_bias is not None:
            put(self, "logit_bias", self._parse_bias(self.logit_bias))
        if isinstance(self.temperature, (int, float)) and GREEDY_TEMPERATURE <= self.temperature < MIN_TEMPERATURE:
            put(self, "temperature", MIN_TEMPERATURE)

    @staticmethod
    def _parse_bias(bias: Any) -> dict[int, float]:
        if not isinstance(bias, dict):
            _refuse("logit_bias", f"must map token ids to numbers, got {bias!r}.")
        if len(bias) > MAX_LOGIT_BIAS:
            _refuse("logit_bias", f"may hold at most {MAX_LOGIT_BIAS} tokens, got {len(bias)}.")
        parsed: dict[int, float] = {}
        for key, value in bias.items():
            # JSON has only text as keys; int() alone would also take True, 1.5 and " 1_0 ".
            if isinstance(key, str):
                is_id = key.isascii() and key.isdigit()
            else:
                is_id = isinstance(key, Integral) and not isinstance(key, bool)
            if not is_id:
                _refuse("logit_bias", f"keys must be token ids, got {key!r}.")
            token = int(key)
            _number(f"logit_bias[{key}]", value, -math.inf, math.inf)
            parsed[token] = float(min(100, max(-100, value)))
        return parsed

    def _check_lists(self) -> None:
        for text in self.stop or ():
            if not isinstance(text, str) or not text:
                _refuse("stop", f"must hold non-empty strings, got {text!r}.")
        if self.stop and not self.detokenize:
            _refuse("stop", "needs detokenize=True: stop strings are found in text.")
        if len(self.stop_token_ids or ()) > MAX_STOP_TOKEN_IDS:
            _refuse(
                "stop_token_ids", f"may hold at most {MAX_STOP_TOKEN_IDS} ids, got {len(self.stop_token_ids or ())}."
            )
        for token in self.stop_token_ids or ():
            _integer("stop_token_ids", token, 0)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                _refuse("allowed_token_ids", "must not be empty: nothing could be sampled.")
            if len(self.allowed_token_ids) > MAX_ALLOWED_TOKEN_IDS:
                _refuse(
                    "allowed_token_ids",
                    f"may hold at most {MAX_ALLOWED_TOKEN_IDS} ids, got {len(self.allowed_token_ids)}.",
                )
            for token in self.allowed_token_ids:
                _integer("allowed_token_ids", token, 0)
        if len(self.bad_words or ()) > MAX_BAD_WORDS:
            _refuse("bad_words", f"may hold at most {MAX_BAD_WORDS} words, got {len(self.bad_words or ())}.")
        for word in self.bad_words or ():
            if not isinstance(word, str) or not word:
                _refuse("bad_words", f"must hold non-empty strings, got {word!r}.")

    def check_vocabulary(self, vocab_size: int, max_logprobs: int) -> None:
        """Check what only the model can tell.

        Raises:
            InvalidRequestError: a token id is not in `[0, vocab_size)`, or more logprobs are asked for than the engine
                allows.
        """
        groups = {
            "stop_token_ids": self.stop_token_ids or (),
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": tuple(self.logit_bias or ()),
        }
        for name, tokens in groups.items():
            for token in tokens:
                if not 0 <= token < vocab_size:
                    _refuse(name, f"token id {token} is not in the vocabulary: ids are 0 to {vocab_size - 1}.")
        limit = vocab_size if max_logprobs == -1 else max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            if asked is not None and (vocab_size if asked == -1 else asked) > limit:
                _refuse(name, f"may be at most max_logprobs={max_logprobs}, got {asked}.")

    @property
    def is_greedy(self) -> bool:
        """True if the most probable token is taken: temperature below `GREEDY_TEMPERATURE`."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """True if past tokens change the logits."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def replace(self, **changes: Any) -> SamplingParams:
        """A validated copy with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names that a user may set."""
        return tuple(f.name for f in fields(cls))


def sampling_defaults(generation: Mapping[str, Any]) -> SamplingParams:
    """What a model's authors recommend where a request says nothing.

    Args:
        generation: content of `generation_config.json`; fields that are absent or null keep our defaults.

    Raises:
        InvalidRequestError: a value is out of range.
    """
    given = {
        ours: generation[theirs] for theirs, ours in GENERATION_FIELDS.items() if generation.get(theirs) is not None
    }
    return SamplingParams(**given)


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Parameters of a beam search, as vLLM names them.

    Beams are ranked by `cumulative_logprob / length ** length_penalty` (Wu et al. 2016, arXiv 1609.08144, without the
    constant).
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _integer("beam_width", self.beam_width, 1, 64)
        _integer("max_tokens", self.max_tokens, 1)
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("length_penalty", self.length_penalty, -10.0, 10.0)  # length ** penalty must stay finite
        _boolean("ignore_eos", self.ignore_eos)
        _boolean("include_stop_str_in_output", self.include_stop_str_in_output)
