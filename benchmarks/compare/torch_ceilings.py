"""What the machine reaches through torch. Imports it when it is called: the driver has none."""

from __future__ import annotations

from benchmarks.ceilings import GEMM_SIZE, READ_BYTES, Ceilings, fastest, gemm_rate


def torch_ceilings(dtype: str, num_threads: int) -> Ceilings:
    """Reading, and products of float32, of `dtype` and of 8-bit integers, on so many threads."""
    import torch

    torch.set_num_threads(num_threads)
    numbers = torch.ones(READ_BYTES // 4)
    vector = torch.ones(8192)
    matrix = numbers.view(-1, len(vector))
    read = max(READ_BYTES / fastest(work) for work in (numbers.max, lambda: torch.mv(matrix, vector)))
    rates = {}
    for name in dict.fromkeys(("float32", dtype)):
        square = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=getattr(torch, name))
        rates[f"torch {name}"] = gemm_rate(lambda square=square: square @ square)
    integers = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=torch.int8)
    rates["torch int8"] = gemm_rate(lambda: torch._int_mm(integers, integers))
    return Ceilings({"torch": read}, rates)
