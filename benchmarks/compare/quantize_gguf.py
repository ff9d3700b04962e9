"""Turn a GGUF file into one of another type. Runs in llama.cpp's environment (Python 3.11).

    python benchmarks/compare/quantize_gguf.py MODEL.gguf OUT.gguf {f32,bf16,q8_0}

llama.cpp's own conversion: every matrix, the embedding and the head included, is dequantized and rounded to the type.
The other peers dequantize the same blocks (`convert_gguf.py`), so bf16 and f32 hold the same numbers there and here.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["LLAMA_CPP_LIB_PATH"] = str(Path(sys.prefix, "llama.cpp", "bin"))
import llama_cpp  # noqa: E402 - looks for its library while it is imported

TYPES = {
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(description="Convert a GGUF file to another type.")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path, help="file to make; it appears only when it is complete")
    parser.add_argument("type", choices=tuple(TYPES))
    args = parser.parse_args()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[args.type]
    params.allow_requantize = True
    partial = args.out.with_name(args.out.name + ".partial")
    if llama_cpp.llama_model_quantize(str(args.gguf).encode(), str(partial).encode(), params):
        parser.exit(1, f"llama.cpp cannot convert {args.gguf} to {args.type}\n")
    partial.replace(args.out)


if __name__ == "__main__":
    main()
