"""`python -m pallas_kernels.aot`: judge the kernels of all ops for a GPU that need not be there.

check [WORDS] [--device H200]    compile the cases whose name contains the words; fails if one has a fault
table [--device H200]            the same as a table in Markdown (docs/measurements/h200-aot.md)
run COMMAND …                    run a command in the environment that `compile_for` needs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pallas_kernels.aot.check import check, table
from pallas_kernels.aot.launch import AotUnavailableError, relaunch, run_launched
from pallas_kernels.device import KNOWN

INSIDE = "--inside"  # the child's mark: the environment is as it should be


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    if arguments[:1] == ["run"] and len(arguments) > 1:
        return run_launched(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("check", "table", "run"))
    parser.add_argument("words", nargs="?", default="", help="only cases whose op or name contains this")
    parser.add_argument("--device", default="h200", type=str.lower, choices=sorted(KNOWN))
    parser.add_argument("--all", action="store_true", help="every case, not only those that stand for their like")
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.action == "run":
        parser.error("run needs a command")
    try:
        if not options.inside:
            return relaunch("pallas_kernels.aot", [*arguments, INSIDE])
        act = check if options.action == "check" else table
        return act(KNOWN[options.device], options.words, every=options.all)
    except AotUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
