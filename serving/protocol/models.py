"""Bodies of `/v1/models`."""

from __future__ import annotations

from typing import Literal

from serving.protocol.base import ResponseBody


class ModelCard(ResponseBody):
    """One name that the model is served under."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "quire"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(ResponseBody):
    """All names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
