"""Tile configurations: explicit > tuned > heuristic.

Tuned ones are data, `tuned/<device>/<op>.json`, written by `python -m pallas_kernels.tune` on the device itself:

    {"device": "NVIDIA H200", "jax": "0.11.2", "date": "2026-11-25", "entries": {KEY: {"config": {...}, "us": 12.3}}}

KEY names everything that the choice may depend on; each op says what that is in its `config.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any

from pallas_kernels.device import Device

logger = logging.getLogger("quire.kernels")


@cache
def tuned_entries(op: str, device_slug: str) -> Mapping[str, Any]:
    """KEY -> entry of an op on a device; empty if it was never tuned there.

    Raises:
        ValueError: the file is not what the tuner writes.
    """
    file = resources.files("pallas_kernels") / "tuned" / device_slug / f"{op}.json"
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))["entries"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a table of tuned configurations: {type(error).__name__}: {error}") from error


def choose_config[C](
    op: str, key: str, config_type: Callable[..., C], device: Device, explicit: C | None, heuristic: Callable[[], C]
) -> C:
    """The configuration to run with.

    Args:
        op: its name.
        key: of the problem, see the op's `config.py`.
        config_type: makes a configuration of a table's fields.
        explicit: what the caller asked for; wins.
        heuristic: makes one of the problem, if it was never tuned.
    """
    if explicit is not None:
        return explicit
    entry = tuned_entries(op, device.slug).get(key)
    if entry is not None:
        logger.debug("%s %s: tuned configuration %s", op, key, entry["config"])
        return config_type(**entry["config"])
    return heuristic()
