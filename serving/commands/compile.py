"""`quire compile`: write a model as a bundle, which starts without tracing or compiling a step.

As with `quire convert`, a bundle appears complete or not at all.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from engine.config import EngineConfig
from serving.backend import BundleCompiler
from serving.commands.convert import help_of_model, require_place, write_folder
from serving.errors import EXIT_OK
from serving.flags import add_engine_flags, engine_settings

SUMMARY = "write a model as a bundle that starts in seconds on this machine"
BUNDLE_MARKER = "bundle.json"

# A bundle holds no drafter, and whether it may be loaded is asked of whoever loads it.
SKIPPED_FLAGS = ("model", "speculative_config", "compile_in_background", "compilation_cache_dir", "trust_bundle")


def set_up(parser: argparse.ArgumentParser, compile_bundle: BundleCompiler) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS] MODEL -o OUT"
    parser.add_argument("model", metavar="MODEL", help=help_of_model())
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace an earlier bundle at OUT")
    add_engine_flags(parser, skip=SKIPPED_FLAGS)
    parser.set_defaults(run=functools.partial(run, compile_bundle=compile_bundle))


def run(args: argparse.Namespace, compile_bundle: BundleCompiler) -> int:
    """Compile, then move the result into place."""
    config = EngineConfig.from_flat(model=args.model, **engine_settings(args))
    out: Path = args.out.absolute()
    require_place(out, [BUNDLE_MARKER], "bundle", force=args.force)
    title, show = f"writing the executables of {args.model}", config.compile.show_progress
    write_folder(out, lambda made, progress: compile_bundle(config, made, progress), title, show=show)
    return EXIT_OK
