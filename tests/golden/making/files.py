"""How golden files are written: readable JSON with number lists on one line, compressed npz, and who made them."""

import datetime
import hashlib
import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

_NUMBER_LIST = re.compile(r"\[\s+(-?[0-9][^\[\]{}\"]*?)\s+\]")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as ASCII JSON; lists of plain numbers stay on one line so that diffs stay short."""
    text = json.dumps(value, indent=2, ensure_ascii=True)
    path.write_text(_NUMBER_LIST.sub(_one_line, text) + "\n", encoding="ascii")


def _one_line(match: re.Match[str]) -> str:
    return "[" + ", ".join(part.strip() for part in match.group(1).split(",")) + "]"


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a compressed npz (the zip carries no time stamps, so equal arrays give equal bytes)."""
    np.savez_compressed(path, **dict(arrays))


def provenance(seed: int | None, date: datetime.date) -> dict[str, Any]:
    """Who made a golden file: library versions, numeric mode, date and seed."""
    return {
        "made_by": "tests/golden/make_golden.py",
        "date": date.isoformat(),
        "seed": seed,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy", "safetensors", "gguf")},
        "dtype": "float32",
        "attn_implementation": "eager",
        "device": "cpu",
    }


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
