"""Bodies of `/v1/embeddings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from serving.protocol.base import Missing, RequestBody, ResponseBody
from serving.protocol.completions import MAX_PROMPTS

_Inputs = (
    Annotated[list[str], Field(max_length=MAX_PROMPTS)] | Annotated[list[list[int]], Field(max_length=MAX_PROMPTS)]
)


class EmbeddingRequest(RequestBody):
    """`POST /v1/embeddings`: one vector per text, pooled from the hidden states after the model's last norm.

    Attributes:
        dimensions: only the model's own size: no model here is trained to be cut.
        pooling: "last" = the hidden state of the last token; "mean" = the mean over all tokens.
        normalize: divide by the L2 norm.
    """

    MISSING: ClassVar[Mapping[str, Missing]] = {
        "priority": Missing("embeddings have none.", (0,)),
        "messages": Missing("give the text as input."),
        "embed_dtype": Missing("embeddings are float32.", ("float32",)),
        "endianness": Missing("embeddings are little-endian.", ("native", "little")),
    }

    input: str | list[int] | _Inputs
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool = True
    cache_salt: str | None = None
    request_id: str | None = None

    @property
    def output_room(self) -> int:
        """Nothing follows the prompt."""
        return 0


class EmbeddingObject(ResponseBody):
    """One vector: its numbers, or their float32 bytes in little-endian order as base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(ResponseBody):
    """Tokens of all inputs together."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(ResponseBody):
    """What `/v1/embeddings` answers; vectors in the order of the inputs."""

    object: Literal["list"] = "list"
    id: str
    created: int
    model: str
    data: list[EmbeddingObject]
    usage: EmbeddingUsage
