"""The KV write in C++ (`native/kv_write.cc`): each row is copied to where it belongs, in place.

XLA makes a loop over rows of its scatter, which took a quarter of a 512-token chunk of a small model.
"""

from __future__ import annotations

import jax

from pallas_kernels import native
from pallas_kernels.device import Device
from pallas_kernels.kv_layout import QUANTIZED, Pages


def device_reason(device: Device) -> str | None:
    """None if the device is a CPU, or why not."""
    return None if device.platform == "cpu" else f"needs a CPU, this is {device.platform}"


def supports(kv_dtype: str) -> str | None:
    """None, or the reason why it cannot write pages of this dtype."""
    if kv_dtype in QUANTIZED:
        return f"pages are {kv_dtype}: rows are quantized on the way"
    return native.unavailable()


def run(pages: Pages, keys: jax.Array, values: jax.Array, slots: jax.Array) -> Pages:
    """See `api.kv_write`."""
    data = pages.data
    shape = jax.ShapeDtypeStruct(data.shape, data.dtype)
    call = jax.ffi.ffi_call("quire_kv_write", shape, input_output_aliases={0: 0})
    return Pages(call(data, keys.astype(data.dtype), values.astype(data.dtype), slots))
