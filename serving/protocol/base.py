"""What all bodies share: strict requests, the error body, usage."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from engine.errors import InvalidRequestError

logger = logging.getLogger("quire.serving")


@dataclass(frozen=True)
class Missing:
    """A field of OpenAI's or vLLM's API that asks for what Quire does not have.

    Attributes:
        reason: what the client is told.
        neutral: values that ask for nothing, besides null.
    """

    reason: str
    neutral: tuple[Any, ...] = ()


class RequestBody(BaseModel):
    """A request. Unknown names are allowed, but for those in `MISSING`."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    MISSING: ClassVar[Mapping[str, Missing]] = {}

    def check_missing(self) -> None:
        """Refuse what is not there; note other unknown names, once per request, at level debug.

        Raises:
            InvalidRequestError: a field asks for a feature that Quire does not have.
        """
        if not (unknown := self.model_extra):
            return
        for name, value in unknown.items():
            missing = self.MISSING.get(name)
            if missing is not None and value is not None and value not in missing.neutral:
                raise InvalidRequestError(f"{name} is not supported: {missing.reason}", name)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("unknown fields of a request: %s", ", ".join(sorted(unknown)))


class ResponseBody(BaseModel):
    """A response, for the schema: what is sent has these fields and no others."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorInfo(ResponseBody):
    """One fault. `param` names the field that was wrong, `code` the fault for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorBody(ResponseBody):
    """The body of every answer with a status of 400 or more."""

    error: ErrorInfo


class PromptTokensDetails(ResponseBody):
    """How many tokens of the prompt were in the prefix cache."""

    cached_tokens: int = 0


class Usage(ResponseBody):
    """Tokens of a request, all prompts and completions together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
