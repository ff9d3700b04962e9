"""What torch's own kernels reach on the same device, where torch is installed: an independent measure of the hardware.

torch is imported here only, and inside functions: it is no dependency, and most machines do not have it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from benchmarks.gpu.part import Skip
from benchmarks.gpu.timing import Times, measure, rotations

DTYPES = ("bf16", "fp8", "int8")


def torch_on_gpu() -> Any:
    """The module.

    Raises:
        Skip: it is not installed, or sees no GPU.
    """
    if importlib.util.find_spec("torch") is None:
        raise Skip("torch is not installed")
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise Skip(f"torch {torch.__version__} sees no GPU")
    return torch


def _time(torch: Any, call: Any) -> Times:
    return measure(call, lambda _: torch.cuda.synchronize())


def copy(size_bytes: int) -> Times:
    """One copy of so many bytes."""
    torch = torch_on_gpu()
    source = torch.randint(0, 255, (size_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return _time(torch, lambda: target.copy_(source))


def matmul(dtype: str, m: int, k: int, n: int) -> Times:
    """`[m, k] @ [n, k].T` in bf16, fp8 (`_scaled_mm`) or int8 (`_int_mm`), weights in turn.

    Raises:
        Skip: no torch on a GPU, or no such kernel for so few rows.
    """
    torch = torch_on_gpu()
    if dtype == "int8" and m <= 16:
        raise Skip("torch._int_mm takes more than 16 rows")
    if dtype == "fp8" and m % 16:
        raise Skip("torch._scaled_mm takes multiples of 16 rows")
    num_sets = rotations(n * k * (2 if dtype == "bf16" else 1))
    x, weights = _operand(torch, dtype, m, k), [_operand(torch, dtype, n, k) for _ in range(num_sets)]
    one = torch.ones((), device="cuda")

    def product(weight: Any) -> Any:
        if dtype == "bf16":
            return x @ weight.t()
        if dtype == "fp8":
            return torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        return torch._int_mm(x, weight.t())

    return _replayed(torch, lambda: [product(weight) for weight in weights], num_sets)


def _operand(torch: Any, dtype: str, rows: int, columns: int) -> Any:
    if dtype == "int8":
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device="cuda")
    numbers = torch.randn(rows, columns, device="cuda").to(torch.bfloat16)
    return numbers.to(torch.float8_e4m3fn) if dtype == "fp8" else numbers


def _replayed(torch: Any, work: Any, num: int) -> Times:
    """Time work as a CUDA graph, so that Python's launches do not count."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()
    times = measure(graph.replay, lambda _: torch.cuda.synchronize(), work=num)
    del kept
    return times


def attention(batch: int, tokens: int, context: int, heads: int, kv_heads: int, head_dim: int) -> Times:
    """Scaled dot product attention in bf16 over dense keys and values: causal if `tokens` equals `context`, otherwise
    one query per sequence that sees everything.

    Raises:
        Skip: no torch on a GPU.
    """
    torch = torch_on_gpu()
    attend = torch.nn.functional.scaled_dot_product_attention
    kv_bytes = 2 * batch * kv_heads * context * head_dim * 2

    def numbers(num_heads: int, length: int) -> Any:
        return torch.randn(batch, num_heads, length, head_dim, device="cuda", dtype=torch.bfloat16)

    num_sets = rotations(kv_bytes)
    q = numbers(heads, tokens)
    sets = [(numbers(kv_heads, context), numbers(kv_heads, context)) for _ in range(num_sets)]
    causal = tokens == context

    def work() -> Any:
        return [attend(q, keys, values, is_causal=causal, enable_gqa=True) for keys, values in sets]

    return _replayed(torch, work, num_sets)
