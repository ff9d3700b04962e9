"""Kernels for a CPU in C++, which XLA calls through its foreign function interface.

The problem: XLA converts packed weights to floats in memory before it multiplies, and its one-row products of 16-bit
floats run on a scalar path. The idea: a few hundred lines of C++, compiled at their first use by the machine's own
compiler for the machine's own instructions, kept in a cache, and run by XLA's own threads. Where there is no compiler,
`unavailable` says so, and operations run on XLA alone.

The package reads no environment: who uses it says with `configure` where libraries are kept, and which compiler makes
them.
"""

from pallas_kernels.native.library import configure, has_bfloat16_dots, has_integer_dots, unavailable

__all__ = ["configure", "has_bfloat16_dots", "has_integer_dots", "unavailable"]
