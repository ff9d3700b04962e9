"""The `quire` command: parser, dispatch, errors and exit codes.

Answers are on stdout; logs, progress and errors are on stderr. A user's fault is one line, `quire: error: …`, and exit
code 2 (`--debug` shows where it came from); `serving/errors.py` has the other exit codes.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper

from engine.errors import QuireError
from serving.backend import (
    BundleCompiler,
    ClientFactory,
    DraftDistiller,
    EngineFactory,
    ModelConverter,
    ModelEvaluator,
    ModelPlanner,
    ModelQuantizer,
    RecordingPlayer,
    compile_bundle,
    convert_model,
    create_client,
    create_engine,
    distill_draft,
    evaluate_model,
    plan_model,
    quantize_model,
    replay_recording,
)
from serving.bench import latency, startup, throughput
from serving.bench import serve as bench_serve
from serving.commands import chat, compile, convert, distill, evaluate, generate, plan, quantize, replay, serve
from serving.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, exit_code
from serving.version import package_version

LOG_LEVELS = ("debug", "info", "warning", "error")
OWN_LOGGERS = ("quire", "engine", "models", "pallas_kernels", "serving")


def main(
    argv: Sequence[str] | None = None,
    *,
    engine_factory: EngineFactory = create_engine,
    converter: ModelConverter = convert_model,
    client_factory: ClientFactory = create_client,
    evaluator: ModelEvaluator = evaluate_model,
    quantizer: ModelQuantizer = quantize_model,
    distiller: DraftDistiller = distill_draft,
    planner: ModelPlanner = plan_model,
    player: RecordingPlayer = replay_recording,
    compiler: BundleCompiler = compile_bundle,
) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None = those of the process.
        engine_factory: makes the engine from a model reference and flat settings.
        converter: does the work of `quire convert`.
        client_factory: makes the engine of `quire serve`.
        evaluator: does the work of `quire eval`.
        quantizer: does the work of `quire quantize`.
        distiller: does the work of `quire distill-draft`.
        planner: does the work of `quire plan`.
        player: does the work of `quire replay`.
        compiler: does the work of `quire compile`.

    Returns:
        The exit code.

    Raises:
        SystemExit: `--help`, `--version`, or arguments that cannot be parsed (argparse's own ways).
    """
    parser = build_parser(
        engine_factory, converter, client_factory, evaluator, quantizer, distiller, planner, player, compiler
    )
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks becomes "?", not an error
    try:
        with _logs_on_stderr(args.log_level):
            code = args.run(args)
            sys.stdout.flush()  # here, where a reader that has gone is still caught
            return code
    except QuireError as error:
        if args.debug:
            raise
        print(f"quire: error: {' '.join(str(error).split())}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def build_parser(
    engine_factory: EngineFactory,
    converter: ModelConverter,
    client_factory: ClientFactory = create_client,
    evaluator: ModelEvaluator = evaluate_model,
    quantizer: ModelQuantizer = quantize_model,
    distiller: DraftDistiller = distill_draft,
    planner: ModelPlanner = plan_model,
    player: RecordingPlayer = replay_recording,
    compiler: BundleCompiler = compile_bundle,
) -> argparse.ArgumentParser:
    """The parser of all commands. `args.run(args)` of what it parses runs the command."""
    parser = argparse.ArgumentParser(
        prog="quire", description="Quire: LLM inference and serving on JAX and XLA.", allow_abbrev=False
    )
    parser.add_argument("--version", action=_ShowVersion)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    generate.set_up(_command(commands, "generate", generate.SUMMARY), engine_factory)
    chat.set_up(_command(commands, "chat", chat.SUMMARY), engine_factory)
    serve.set_up(_command(commands, "serve", serve.SUMMARY), client_factory)
    bench = commands.add_parser("bench", help="measure speed", description="Measure the engine or a server.")
    measurements = bench.add_subparsers(title="measurements", metavar="MEASUREMENT", required=True)
    latency.set_up(_command(measurements, "latency", latency.SUMMARY), engine_factory)
    throughput.set_up(_command(measurements, "throughput", throughput.SUMMARY), engine_factory)
    bench_serve.set_up(_command(measurements, "serve", bench_serve.SUMMARY))
    startup.set_up(_command(measurements, "startup", startup.SUMMARY))
    convert.set_up(_command(commands, "convert", convert.SUMMARY), converter)
    compile.set_up(_command(commands, "compile", compile.SUMMARY), compiler)
    evaluate.set_up(_command(commands, "eval", evaluate.SUMMARY), evaluator)
    distill.set_up(_command(commands, "distill-draft", distill.SUMMARY), distiller)
    plan.set_up(_command(commands, "plan", plan.SUMMARY), planner)
    quantize.set_up(_command(commands, "quantize", quantize.SUMMARY), quantizer)
    replay.set_up(_command(commands, "replay", replay.SUMMARY), player)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        allow_abbrev=False,  # so that a script does not break when a new flag makes one ambiguous
    )
    parser.add_argument(
        "--log-level", choices=LOG_LEVELS, default="info", help="least level of logs on stderr (default: info)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _ShowVersion(argparse.Action):
    """Look the version up only when asked: that reads files."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"quire {package_version()}")
        parser.exit()


@contextlib.contextmanager
def _logs_on_stderr(level: str) -> Iterator[None]:
    """While inside, the logs of our own packages go to stderr, from `level` up; other libraries' stay as they are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in OWN_LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level.upper())
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (old_level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = propagate


if __name__ == "__main__":
    sys.exit(main())
