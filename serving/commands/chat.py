"""`quire chat`: a conversation in the terminal.

The whole history goes to the model each time; the prefix cache makes that cheap.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType

from engine.config import EngineConfig
from engine.errors import InvalidRequestError, RequestFailedError
from engine.sampling_params import RequestOutputKind, SamplingParams
from serving.backend import EngineFactory, EngineLike, Message
from serving.errors import EXIT_OK
from serving.flags import add_engine_flags, add_sampling_flags, engine_settings, sampling_settings
from serving.timing import Timing, format_speed

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 - its import gives input() line editing and a history

SUMMARY = "talk with the model"
COMMANDS = "/reset starts anew, /exit (or Ctrl-D) ends, Ctrl-C stops an answer"

SKIPPED_ENGINE_FLAGS = ("skip_tokenizer_init",)
# A conversation needs one answer, as text, and has no place to show numbers.
SKIPPED_SAMPLING_FLAGS = ("output_kind", "n", "logprobs", "prompt_logprobs", "detokenize", "max_tokens")


def set_up(parser: argparse.ArgumentParser, create: EngineFactory) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS]"
    parser.add_argument("--system", metavar="TEXT", help="what the model is told about its role")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="most tokens of an answer (default: as many as the context holds)"
    )
    add_sampling_flags(parser, skip=SKIPPED_SAMPLING_FLAGS)
    add_engine_flags(parser, skip=SKIPPED_ENGINE_FLAGS)
    parser.set_defaults(run=functools.partial(run, create=create))


def run(args: argparse.Namespace, create: EngineFactory) -> int:
    """Read messages and answer them until the input ends."""
    # Both are checked here, before jax and the model are loaded, so that a wrong flag is answered at once.
    given = sampling_settings(args) | {"max_tokens": args.max_tokens, "output_kind": RequestOutputKind.DELTA}
    SamplingParams(**given)
    settings = engine_settings(args)
    model = EngineConfig.from_flat(**settings).load.model
    settings.pop("model", None)
    settings.setdefault("compile_in_background", True)  # somebody waits for the first word
    with create(model, **settings) as engine:
        print(f"{model}: {COMMANDS}.", file=sys.stderr)
        converse(engine, engine.get_default_sampling_params().replace(**given), args.system)
    return EXIT_OK


def converse(engine: EngineLike, params: SamplingParams, system: str | None) -> None:
    """Answer each line of stdin. A message that gets no answer is taken back, and the conversation goes on."""
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    history = list(start)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            history = list(start)
            print("(the conversation starts anew)", file=sys.stderr)
        elif line.startswith("/"):
            print(f"There is no command {line.split()[0]}: {COMMANDS}.", file=sys.stderr)
        else:
            question: Message = {"role": "user", "content": line}
            try:
                answer = _answer(engine, [*history, question], params)
            except InvalidRequestError as error:  # most often: the conversation no longer fits the context
                print(f"quire: error: {error} (/reset starts anew)", file=sys.stderr)
            except RequestFailedError as error:
                print(f"\nquire: error: {error}", file=sys.stderr)
            else:
                history += [question, {"role": "assistant", "content": answer}]


def _lines() -> Iterator[str]:
    """The user's lines without surrounding spaces, empty ones left out."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def _answer(engine: EngineLike, messages: list[Message], params: SamplingParams) -> str:
    """Print the answer while it is made, its speed after it; returns its text.

    Raises:
        InvalidRequestError: the engine refuses the request.
        RequestFailedError: a step failed.
    """
    text = ""
    num_tokens = 0
    timing = Timing()
    deltas = engine.stream(engine.apply_chat_template(messages), replace(params))
    with _Interrupt() as interrupt, contextlib.closing(deltas):
        for output in deltas:
            completion = output.outputs[0]
            print(completion.text, end="", flush=True)
            text += completion.text
            num_tokens += len(completion.token_ids)
            timing = Timing.from_metrics(output.metrics, num_tokens)
            if interrupt.requested:
                break
    print()
    stopped = ", stopped" if interrupt.requested else ""
    print(f"[{num_tokens} tokens{stopped} · {format_speed(timing)}]", file=sys.stderr)
    return text


class _Interrupt:
    """While inside, the first Ctrl-C only sets `requested`; a second one raises KeyboardInterrupt as usual.

    So an answer ends between two tokens, not inside a step.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> _Interrupt:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
