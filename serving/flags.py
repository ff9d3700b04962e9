"""Flags made from dataclasses: one per field, with its name, type, choices, default and help.

    max_model_len: int | None = …   →   --max-model-len N        (also: --max-model-len none)
    enable_prefix_caching: bool     →   --enable-prefix-caching / --no-enable-prefix-caching
    stop: list[str] | None          →   --stop TEXT, which may be given again
    stop_token_ids: list[int]       →   --stop-token-ids 1,2,3
    logit_bias: dict[int, float]    →   --logit-bias '{"17": -100}'

Only flags that were given reach the settings; all other defaults stay with the dataclass. Ranges are checked there too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from serving.http.settings import ServerSettings

# `--seed` is the engine's, as in vLLM: it seeds every request that brings no seed of its own.
SAMPLING_RENAMES = {"seed": "request-seed"}

SAMPLING_HELP = {
    "n": "number of completions of each prompt",
    "presence_penalty": "subtracted from the logit of every token that was generated, -2 to 2",
    "frequency_penalty": "subtracted from a token's logit each time it was generated, -2 to 2",
    "repetition_penalty": "divides the logits of tokens seen in prompt or output; above 1 discourages repetition",
    "temperature": "0 = greedy; up to 2",
    "top_p": "sample from the most probable tokens that together reach this probability",
    "top_k": "sample from this many most probable tokens; 0 or -1 = all",
    "min_p": "leave out tokens less probable than this fraction of the most probable one",
    "seed": "seed of each request; default: derived from the engine's --seed",
    "stop": "end when this text is generated; may be given again",
    "stop_token_ids": "end when one of these tokens is generated",
    "ignore_eos": "go on after the end-of-sequence token",
    "max_tokens": "most tokens to generate; none = as many as the context holds",
    "min_tokens": "fewest tokens before a stop may end the generation",
    "logprobs": "give this many top log-probabilities of each generated token; -1 = all",
    "prompt_logprobs": "give this many top log-probabilities of each prompt token; -1 = all",
    "detokenize": "turn token ids into text",
    "skip_special_tokens": "leave special tokens out of the text",
    "spaces_between_special_tokens": "put spaces between special tokens in the text",
    "include_stop_str_in_output": "keep the stop text in the output",
    "output_kind": "what each output of a stream carries",
    "logit_bias": "numbers added to the logits of tokens, as a JSON object from token id to number",
    "allowed_token_ids": "generate only these tokens",
    "bad_words": "never generate this text; may be given again",
    "skip_reading_prefix_cache": "compute the prompt anew even if it is cached",
}

ENGINE = "engine"
SAMPLING = "sampling"
SERVER = "server"


class FlagTarget(Protocol):
    """Where a flag can be added: a parser or a group of one."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action: ...


def add_engine_flags(
    parser: argparse.ArgumentParser, *, skip: Collection[str] = (), only: Collection[str] | None = None
) -> None:
    """Add the flags of `EngineConfig`, one group per part: of all fields but `skip`, or of those in `only`."""
    for part, kind in typing.get_type_hints(EngineConfig).items():
        title = (kind.__doc__ or part).splitlines()[0].rstrip(".")
        unwanted = [
            f.name for f in dataclasses.fields(kind) if f.name in skip or (only is not None and f.name not in only)
        ]
        _add_fields(parser.add_argument_group(f"{part}: {title}"), ENGINE, kind, unwanted, helps={}, renames={})


def add_sampling_flags(parser: argparse.ArgumentParser, *, skip: Collection[str] = ()) -> None:
    """Add the flags of `SamplingParams`, but for the fields named in `skip`."""
    group = parser.add_argument_group("sampling: Parameters of each generation")
    _add_fields(group, SAMPLING, SamplingParams, skip, helps=SAMPLING_HELP, renames=SAMPLING_RENAMES)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ServerSettings`."""
    group = parser.add_argument_group("server: Where the server listens and what it allows")
    _add_fields(group, SERVER, ServerSettings, (), helps={}, renames={})


def server_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The server settings that were given on the command line."""
    return _collect(args, SERVER)


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The engine settings that were given on the command line."""
    return _collect(args, ENGINE)


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that were given on the command line."""
    return _collect(args, SAMPLING)


def _collect(args: argparse.Namespace, owner: str) -> dict[str, Any]:
    prefix = f"{owner}:"
    return {name.removeprefix(prefix): value for name, value in vars(args).items() if name.startswith(prefix)}


def _add_fields(
    target: FlagTarget,
    owner: str,
    kind: type,
    skip: Collection[str],
    *,
    helps: Mapping[str, str],
    renames: Mapping[str, str],
) -> None:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in skip:
            continue
        text = helps.get(field.name) or field.metadata.get("help")
        if text is None:
            raise TypeError(f"{kind.__name__}.{field.name} has no help text to make a flag from.")
        options = _options(hints[field.name], field.metadata.get("choices"))
        # The destination carries its owner, so that two dataclasses may have a field of the same name.
        options |= {"dest": f"{owner}:{field.name}", "default": argparse.SUPPRESS, "help": _help(text, field.default)}
        target.add_argument("--" + renames.get(field.name, field.name.replace("_", "-")), **options)


def _help(text: str, default: Any) -> str:
    known = default is not dataclasses.MISSING and default is not None
    if known and "default:" not in text:
        text += f" (default: {json.dumps(default) if isinstance(default, bool) else default})"
    return text.replace("%", "%%")


def _options(hint: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    """The `add_argument` options for a field of type `hint`.

    Raises:
        TypeError: no flag can be made from such a type.
    """
    members = _members(hint)
    optional = type(None) in members
    if choices is not None:
        return {"choices": choices}
    if bool in members:
        return {"action": argparse.BooleanOptionalAction}
    if dict[int, float] in members:
        return {"type": _token_map, "metavar": "JSON"}
    if list[int] in members:
        return {"type": _integers, "metavar": "IDS"}
    if list[str] in members:
        return {"action": "append", "metavar": "TEXT"}
    for kind, parse, metavar in ((int, _integer, "N"), (float, _number, "X"), (str, str, "TEXT")):
        if kind in members:
            return {"type": _or_none(parse) if optional and kind is not str else parse, "metavar": metavar}
    raise TypeError(f"No flag can be made from a field of type {hint}.")


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _integers(text: str) -> list[int]:
    return [_integer(part) for part in text.split(",") if part.strip()]


def _token_map(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object such as '{{\"17\": -100}}'")
    return value


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse_or_none(text: str) -> Any:
        return None if text.lower() == "none" else parse(text)

    return parse_or_none
