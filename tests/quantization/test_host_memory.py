"""Host memory at load: what is allocated never grows far beyond the checkpoint, let alone to its dense twin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.quantization.packing import write_quantized

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "num_hidden_layers": 18,
    "vocab_size": 64,
    "dtype": "bfloat16",
}
# Private memory only: pages of the mapped checkpoint are the kernel's to keep or drop. On a CPU the "device" lies in it
# as well, so that what the test allows is all weights once and a few projections on their way.
LOADER = """
import sys, threading, time
from pathlib import Path
import jax
from models.loading.load import load_model

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(8)))
load_model(Path(sys.argv[2]))  # a small one of the same shapes of layers: what compiling leaves behind is not weights
before, peak, done = private(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(Path(sys.argv[1]))
done = True
watcher.join()
print(peak - before, private() - before)
"""


def _random_awq(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
    if module == "lm_head":
        return None
    n, k = shape
    words, groups = n // 8, k // 128
    tensors = {
        "qweight": rng.integers(-(2**31), 2**31, (k, words), np.int32),
        "qzeros": rng.integers(-(2**31), 2**31, (groups, words), np.int32),
        "scales": rng.uniform(0.001, 0.002, (groups, n)).astype(np.float16),
    }
    return tensors, np.empty(0)


@pytest.mark.slow
def test_a_checkpoint_of_120_megabytes(tmp_path: Path) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    for name, layers in (("large", SIZES["num_hidden_layers"]), ("small", 1)):
        write_quantized(tmp_path / name, config, _random_awq, **SIZES | {"num_hidden_layers": layers})
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 115e6
    command = [sys.executable, "-c", LOADER, str(tmp_path / "large"), str(tmp_path / "small")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    peak, kept = map(int, run.stdout.split())
    print(json.dumps({"checkpoint": size, "peak": peak, "kept": kept}))
    assert kept > 0.7 * size, "the weights are not here at all"
    assert peak < 1.3 * size
