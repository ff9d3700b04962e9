"""Writes this step's keys and values into their pages."""

from pallas_kernels.kv_write.api import OP, kv_write, slots_of

__all__ = ["OP", "kv_write", "slots_of"]
