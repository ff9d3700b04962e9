"""`quire convert`: write a model as a checkpoint of fused, ready-to-serve weights, which loads faster than its source.

The checkpoint is written beside its place and moved there when it is complete: an interrupted conversion leaves nothing
that looks like a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.config import EngineConfig, ModelLoadConfig
from engine.errors import QuireError
from engine.runtime.progress import Report, progress_bar
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
    parser.add_argument("model", metavar="MODEL", help=help_of_model())
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace an earlier conversion at OUT")
    add_engine_flags(parser, only=USED_FLAGS)
    parser.set_defaults(run=functools.partial(run, convert=convert))


def help_of_model() -> str:
    """What a model reference may be."""
    return next(field.metadata["help"] for field in dataclasses.fields(ModelLoadConfig) if field.name == "model")


def run(args: argparse.Namespace, convert: ModelConverter) -> int:
    """Convert, then move the result into place."""
    config = EngineConfig.from_flat(model=args.model, **engine_settings(args))
    out: Path = args.out.absolute()
    check_place(out, force=args.force)
    title, show = f"converting {args.model}", config.compile.show_progress
    write_folder(out, lambda made, progress: convert(config, made, progress), title, show=show)
    return EXIT_OK


def write_folder(out: Path, write: Callable[[Path, Report], None], title: str, *, show: bool) -> None:
    """Have a folder written beside its place, move it there when it is complete, and say how large it is.

    Args:
        out: absolute; what is there is replaced.
        write: makes a folder that does not exist yet, and reports how far it is.
        title: of the progress bar, which is there if `show`.

    Raises:
        UsageError: the place cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            made = Path(scratch) / "made"
            with progress_bar(title, show=show) as progress:
                write(made, progress)
            if out.exists():
                out.rename(Path(scratch) / "replaced")
            made.rename(out)
    except QuireError:  # some of these are OSErrors too, and already say what is wrong
        raise
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error}") from error
    size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size_bytes / 1e6:.1f} MB")


def check_place(out: Path, *, force: bool) -> None:
    """As `require_place`, of a conversion."""
    require_place(out, [CHECKPOINT_MARKER, f"*/{CHECKPOINT_MARKER}"], "conversion", force=force)


def require_place(out: Path, markers: Sequence[str], what: str, *, force: bool) -> None:
    """Refuse a place that holds something, unless it is an earlier result and `force` allows to replace it.

    Args:
        markers: patterns of files, one of which every result has.
        what: the result, in a word.

    Raises:
        UsageError: `out` may not be written.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out.is_dir() and any(any(out.glob(pattern)) for pattern in markers)):
        raise UsageError(f"{out} exists and is not an earlier {what}; choose another place.")
    if not force:
        raise UsageError(f"{out} holds an earlier {what}; --force replaces it.")
