"""Turn a GGUF file into a Hugging Face directory in float32. Runs in the transformers environment (Python 3.11).

    python benchmarks/compare/convert_gguf.py MODEL.gguf OUT

Done once per file; peers load the result in the dtype they are to run in, so all dequantize the same numbers. Mends
what the conversion loses: the tokenizer's digit splitting (`tokenizer.ggml.pre = "smollm"` means one token per digit,
*then* byte-level BPE; the converter keeps only the second), and fields that describe the GGUF file instead of the
model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

DIGITS_FIRST = ("smollm",)  # values of tokenizer.ggml.pre that split digits before byte-level BPE
EPSILON_KEY = "{architecture}.attention.layer_norm_rms_epsilon"


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        content.pop(name, None)
        if value is not None:
            content[name] = value
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _save_model(source: Path, out: Path, epsilon: float | None) -> None:
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # It is no quantized model any more; left in, these would make `save_pretrained` write a quantization config.
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(out)
    # GGUF stores the epsilon as float32; the model was made with the short decimal number beside it.
    exact = None if epsilon is None else float(f"{epsilon:.6g}")
    _edit(out / "config.json", _model_name_or_path=None, **({} if exact is None else {"rms_norm_eps": exact}))


def _save_tokenizer(source: Path, out: Path, pre: str | None) -> None:
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)
    tokenizer = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    splitter = tokenizer["pre_tokenizer"]
    if pre in DIGITS_FIRST and splitter["type"] == "ByteLevel":
        digits = {"type": "Digits", "individual_digits": True}
        _edit(out / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, splitter]})
    _edit(
        out / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        clean_up_tokenization_spaces=False,
        backend=None,
        is_local=None,
        local_files_only=None,
    )


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(description="Convert a GGUF file to a Hugging Face directory.")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path, help="directory to make; it appears only when it is complete")
    args = parser.parse_args()
    reader = GGUFReader(args.gguf)
    architecture = _field(reader, "general.architecture")
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _save_model(args.gguf, partial, _field(reader, EPSILON_KEY.format(architecture=architecture)))
    _save_tokenizer(args.gguf, partial, _field(reader, "tokenizer.ggml.pre"))
    partial.replace(args.out)


if __name__ == "__main__":
    main()
