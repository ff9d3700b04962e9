"""`quire convert`: write a model as a checkpoint of fused, ready-to-serve weights, which loads faster than its source.

The checkpoint is written beside its place and moved there when it is complete: an interrupted conversion leaves nothing
that looks like a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from pathlib import Path

from engine.config import EngineConfig, ModelLoadConfig
from engine.errors import QuireError
from engine.runtime.progress import progress_bar
from serving.backend import ModelConverter
from serving.errors import EXIT_OK, UsageError
from serving.flags import add_engine_flags, engine_settings

SUMMARY = "write a model as ready-to-serve weights"

# A conversion reads a model and writes it; it neither serves nor compiles.
USED_FLAGS = ("tokenizer", "dtype", "load_format", "revision", "download_dir", "seed", "show_progress")
CHECKPOINT_MARKER = "_CHECKPOINT_METADATA"  # orbax puts this file into each checkpoint


def set_up(parser: argparse.ArgumentParser, convert: ModelConverter) -> None:
    """Add this command's flags to its parser."""
    parser.usage = "%(prog)s [OPTIONS] MODEL -o OUT"
    parser.add_argument("model", metavar="MODEL", help=_help_of_model())
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace an earlier conversion at OUT")
    add_engine_flags(parser, only=USED_FLAGS)
    parser.set_defaults(run=functools.partial(run, convert=convert))


def _help_of_model() -> str:
    return next(field.metadata["help"] for field in dataclasses.fields(ModelLoadConfig) if field.name == "model")


def run(args: argparse.Namespace, convert: ModelConverter) -> int:
    """Convert, then move the result into place."""
    config = EngineConfig.from_flat(model=args.model, **engine_settings(args))
    out: Path = args.out.absolute()
    check_place(out, force=args.force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            made = Path(scratch) / "made"
            with progress_bar(f"converting {args.model}", show=config.compile.show_progress) as progress:
                convert(config, made, progress)
            if out.exists():
                out.rename(Path(scratch) / "replaced")
            made.rename(out)
    except QuireError:  # some of these are OSErrors too, and already say what is wrong
        raise
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error}") from error
    size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size_bytes / 1e6:.1f} MB")
    return EXIT_OK


def check_place(out: Path, *, force: bool) -> None:
    """Refuse a place that holds something, unless it is an earlier conversion and `force` allows to replace it.

    Raises:
        UsageError: `out` may not be written.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    is_conversion = out.is_dir() and any(
        any(out.glob(pattern)) for pattern in (CHECKPOINT_MARKER, f"*/{CHECKPOINT_MARKER}")
    )
    if not is_conversion:
        raise UsageError(f"{out} exists and is not an earlier conversion; choose another place.")
    if not force:
        raise UsageError(f"{out} holds an earlier conversion; --force replaces it.")
