"""`quire generate`: complete prompts, as text for a reader or as one JSON object per prompt for a program.

A single prompt streams; several prompts run as one batch and are printed in their order. By default the model continues
the text as it is; `--chat` makes each prompt the user's message of a conversation.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from engine.sampling_params import RequestOutputKind, SamplingParams
from serving.backend import EngineFactory, EngineLike
from serving.errors import EXIT_FAILED, EXIT_OK, UsageError
from serving.flags import add_engine_flags, add_sampling_flags, engine_settings, sampling_settings
from serving.timing import Timing, format_speed

SUMMARY = "complete prompts"

# Prompts are text here, so there has to be a tokenizer; how an output is cut into a stream is not the user's concern.
SKIPPED_ENGINE_FLAGS = ("skip_tokenizer_init",)
SKIPPED_SAMPLING_FLAGS = ("output_kind",)


def set_up(parser: argparse.ArgumentParser, create: EngineFactory) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS] [PROMPT ...]"  # argparse's own would list some fifty flags
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to complete; '-' reads it from stdin")
    parser.add_argument(
        "-f",
        "--file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="file to complete; may be given again",
    )
    parser.add_argument("--lines", action="store_true", help="each line of a file or of stdin is a prompt of its own")
    parser.add_argument(
        "--chat", action="store_true", help="make each prompt a user's message (the model's chat template)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt, one per line")
    add_sampling_flags(parser, skip=SKIPPED_SAMPLING_FLAGS)
    add_engine_flags(parser, skip=SKIPPED_ENGINE_FLAGS)
    parser.set_defaults(run=functools.partial(run, create=create))


def run(args: argparse.Namespace, create: EngineFactory) -> int:
    """Generate, print, and return the exit code: `EXIT_FAILED` if any request failed while it ran."""
    prompts = read_prompts(args.prompts, args.file, by_line=args.lines)
    # Both are checked here, before jax and the model are loaded, so that a wrong flag is answered at once.
    given = sampling_settings(args)
    params = SamplingParams(**given)
    settings = engine_settings(args)
    model = EngineConfig.from_flat(**settings).load.model
    if not args.json:
        _refuse_what_only_json_shows(params)
    settings.pop("model", None)
    settings.setdefault("compile_in_background", True)  # somebody waits for the first word
    with create(model, **settings) as engine:
        params = engine.get_default_sampling_params().replace(**given)
        inputs = [_as_chat(engine, prompt) if args.chat else prompt for prompt in prompts]
        if len(prompts) == 1 and params.n == 1 and not args.json:
            return _stream_one(engine, prompts[0], inputs[0], params, chat=args.chat)
        show_progress = len(prompts) > 1 and sys.stderr.isatty()
        outputs = engine.generate(inputs, params, use_tqdm=show_progress)
        if args.json:
            return _print_json(outputs)
        return _print_all(engine, prompts, outputs, chat=args.chat)


def read_prompts(given: Sequence[str], files: Sequence[Path], *, by_line: bool) -> list[str]:
    """The prompts of the command line, of stdin where a prompt is '-', and of files, in this order.

    Raises:
        UsageError: there is none, or a file cannot be read.
    """
    prompts: list[str] = []
    for prompt in given:
        prompts += _split(sys.stdin.read(), by_line) if prompt == "-" else [prompt]
    for path in files:
        try:
            prompts += _split(path.read_text(encoding="utf-8"), by_line)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read prompts from {path}: {error}") from error
    if not prompts:
        raise UsageError("there is no prompt: give one, '-' for stdin, or -f FILE.")
    return prompts


def _split(text: str, by_line: bool) -> list[str]:
    return [line for line in text.splitlines() if line.strip()] if by_line else [text]


def _refuse_what_only_json_shows(params: SamplingParams) -> None:
    only_json = {
        "--logprobs": params.logprobs is not None,
        "--prompt-logprobs": params.prompt_logprobs is not None,
        "--no-detokenize": not params.detokenize,
    }
    for flag, is_set in only_json.items():
        if is_set:
            raise UsageError(f"{flag} needs --json: its result is not text.")


def _as_chat(engine: EngineLike, prompt: str) -> list[int]:
    return engine.apply_chat_template([{"role": "user", "content": prompt}])


def _stream_one(engine: EngineLike, prompt: str, tokens: str | list[int], params: SamplingParams, *, chat: bool) -> int:
    """Print a completion while it is made, then its speed and what it ran on.

    Raises:
        RequestFailedError: a step failed.
    """
    _print_prompt(prompt, chat=chat)
    num_tokens, reason, timing = 0, None, Timing()
    deltas = engine.stream(tokens, replace(params, output_kind=RequestOutputKind.DELTA))
    with contextlib.closing(deltas):
        for output in deltas:
            completion = output.outputs[0]
            print(completion.text, end="", flush=True)
            num_tokens += len(completion.token_ids)
            reason, timing = completion.finish_reason, Timing.from_metrics(output.metrics, num_tokens)
    print(f"\n\n{_summary(num_tokens, reason)} · {format_speed(timing)}")
    print(f"implementation: {format_implementations(engine.describe())}")
    return EXIT_OK


def _print_all(engine: EngineLike, prompts: Sequence[str], outputs: Sequence[RequestOutput], *, chat: bool) -> int:
    for prompt, output in zip(prompts, outputs, strict=True):
        for completion in output.outputs:
            _print_prompt(prompt, chat=chat)
            print(completion.text)
        num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        reasons = ", ".join(str(completion.finish_reason) for completion in output.outputs)
        print(f"\n{_summary(num_tokens, reasons)} · {format_speed(Timing.of(output))}\n")
    print(f"implementation: {format_implementations(engine.describe())}")
    return _report_failures([output.error for output in outputs if output.error is not None])


def _print_prompt(prompt: str, *, chat: bool) -> None:
    """The prompt as the reader should see it: a question above its answer, or the text that goes on."""
    print(f"> {prompt}\n" if chat else prompt, end="\n" if chat else "", flush=True)


def _summary(num_tokens: int, reason: str | None) -> str:
    return f"{num_tokens} tokens ({reason})"


def _print_json(outputs: Sequence[RequestOutput]) -> int:
    for output in outputs:
        print(json.dumps(as_json(output)))
    return _report_failures([output.error for output in outputs if output.error is not None])


def _report_failures(messages: Sequence[str]) -> int:
    for message in messages:
        print(f"quire: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_FAILED if messages else EXIT_OK


def as_json(output: RequestOutput) -> dict[str, Any]:
    """One finished request as a JSON object.

    `text`, `token_ids`, `finish_reason` and `stop_reason` are the first completion's; with n > 1, `completions` has all
    of them. `completion_tokens` counts all. `ttft_s` is null if no token came, `tokens_per_s` (after the first token)
    also if only one did. Log-probabilities and `error` are there if asked for, or if there is one.
    """
    timing = Timing.of(output)
    completions = [_completion_as_json(completion) for completion in output.outputs]
    value: dict[str, Any] = {"prompt": output.prompt}
    value |= (
        completions[0] if completions else {"text": "", "token_ids": [], "finish_reason": "error", "stop_reason": None}
    )
    value |= {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": sum(len(completion.token_ids) for completion in output.outputs),
        "cached_tokens": output.num_cached_tokens,
        "ttft_s": timing.ttft_s,
        "tokens_per_s": timing.tokens_per_s,
    }
    if len(completions) > 1:
        value["completions"] = [{"index": c.index} | v for c, v in zip(output.outputs, completions, strict=True)]
    if output.prompt_logprobs is not None:
        value["prompt_logprobs"] = [entry and _logprobs_as_json(entry) for entry in output.prompt_logprobs]
    if output.error is not None:
        value["error"] = output.error
    return value


def _completion_as_json(completion: CompletionOutput) -> dict[str, Any]:
    value: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        value["cumulative_logprob"] = completion.cumulative_logprob
        value["logprobs"] = [_logprobs_as_json(entry) for entry in completion.logprobs]
    return value


def _logprobs_as_json(entry: TokenLogprobs) -> dict[str, Any]:
    return {str(token): asdict(logprob) for token, logprob in entry.items()}


def format_implementations(description: Mapping[str, Any]) -> str:
    """`xla (cpu, float32)`, or each operation's own if they differ: `paged_attention mosaic_gpu, matmul xla (…)`.

    Why nothing better runs is in the log, not here.
    """
    chosen = {operation: text.partition(" (")[0] for operation, text in description["implementations"].items()}
    names = set(chosen.values())
    text = names.pop() if len(names) == 1 else ", ".join(f"{operation} {name}" for operation, name in chosen.items())
    return f"{text} ({description['device']}, {description['dtype']})"
