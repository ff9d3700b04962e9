"""The n sequences of each request, and the limits on the queue of requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import ContextLengthError, InvalidRequestError, QueueFullError
from engine.requests.request import Request
from engine.requests.sequence import Sequence
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.prefix_hash import root_hash


@dataclass
class RequestGroup:
    """The sequences of one live request.

    Attributes:
        request: what was asked.
        sequences: all n, by index; the first is the leader.
        root: parent hash of their first blocks.
        num_leader_tokens: the others wait until the leader has computed so many tokens, to find its blocks in the
            cache. num_unfinished: sequences not finished yet. queued: True until the first of them is admitted.
    """

    request: Request
    sequences: tuple[Sequence, ...]
    root: bytes
    num_leader_tokens: int
    num_unfinished: int
    queued: bool = True

    @property
    def reads_cache(self) -> bool:
        """False if every prompt token must be computed: their logprobs were asked for, or the user wants it so."""
        params = self.request.params
        return params.prompt_logprobs is None and not params.skip_reading_prefix_cache

    def may_start(self, sequence: Sequence) -> bool:
        """Whether the sequence need not wait for its leader. If the leader ended early, the others go on alone."""
        leader = self.sequences[0]
        return sequence is leader or leader.finished or leader.num_computed >= self.num_leader_tokens


class RequestGroups:
    """All live requests. A request is *queued* from `add` until its first sequence is admitted, or until it ends."""

    def __init__(self, limits: SchedulerLimits, capacity_tokens: int) -> None:
        self.num_queued_reqs = 0
        self.num_queued_tokens = 0
        self._limits = limits
        self._capacity_tokens = capacity_tokens
        self._groups: dict[str, RequestGroup] = {}
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[RequestGroup]:
        return iter(self._groups.values())

    def of(self, sequence: Sequence) -> RequestGroup:
        """The group of a sequence that is not finished."""
        return self._groups[sequence.request.request_id]

    def find(self, request_id: str) -> RequestGroup | None:
        """The group of a live request, or None."""
        return self._groups.get(request_id)

    def add(self, sequences: tuple[Sequence, ...]) -> None:
        """Take in all sequences of one request, or none.

        Raises:
            InvalidRequestError: a live request has the same id.
            ContextLengthError: the prompt can never run.
            QueueFullError: too many requests or prompt tokens wait already.
        """
        request = sequences[0].request
        if [(s.request, s.index) for s in sequences] != [(request, index) for index in range(request.params.n)]:
            raise ValueError(f"need the n={request.params.n} sequences of request {request.request_id!r}, in order")
        if request.request_id in self._groups:
            message = f"request_id {request.request_id!r} is in use by a request that has not ended."
            raise InvalidRequestError(message, parameter="request_id")
        self._check_length(request)
        self._check_queue(request.num_prompt_tokens)
        private_to = None if self._limits.enable_prefix_caching else self._num_added
        block_size = self._limits.block_size
        group = RequestGroup(
            request=request,
            sequences=sequences,
            root=root_hash(request.cache_salt, private_to),
            num_leader_tokens=(request.num_prompt_tokens - 1) // block_size * block_size,
            num_unfinished=len(sequences),
        )
        if not group.reads_cache:
            group.num_leader_tokens = 0
        self._num_added += 1
        self._groups[request.request_id] = group
        self.num_queued_reqs += 1
        self.num_queued_tokens += request.num_prompt_tokens

    def note_admitted(self, group: RequestGroup) -> None:
        """One of its sequences was admitted: the request is not queued any more."""
        if group.queued:
            group.queued = False
            self.num_queued_reqs -= 1
            self.num_queued_tokens -= group.request.num_prompt_tokens

    def note_finished(self, sequence: Sequence) -> None:
        """One sequence finished; with the last one the request is forgotten."""
        group = self.of(sequence)
        group.num_unfinished -= 1
        if group.num_unfinished == 0:
            self.note_admitted(group)
            del self._groups[group.request.request_id]

    def _check_length(self, request: Request) -> None:
        limits, num_prompt_tokens = self._limits, request.num_prompt_tokens
        if request.pooling is None and num_prompt_tokens >= limits.max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {limits.max_model_len} tokens. However, your prompt contains "
                f"{num_prompt_tokens} tokens, and at least one is needed for the output."
            )
        if num_prompt_tokens > limits.max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {limits.max_model_len} tokens. However, your prompt contains "
                f"{num_prompt_tokens} tokens."
            )
        if num_prompt_tokens > self._capacity_tokens:
            raise ContextLengthError(
                f"The prompt contains {num_prompt_tokens} tokens, but the KV cache holds only {self._capacity_tokens}."
            )
        if not limits.enable_chunked_prefill and num_prompt_tokens > limits.max_num_batched_tokens:
            raise ContextLengthError(
                f"The prompt contains {num_prompt_tokens} tokens, but one step computes at most max_num_batched_tokens="
                f"{limits.max_num_batched_tokens}, and enable_chunked_prefill=False forbids splitting it."
            )

    def _check_queue(self, num_prompt_tokens: int) -> None:
        # With nobody queued the request is taken whatever its length: "try again later" would not help it.
        max_reqs, max_tokens = self._limits.max_num_queued_reqs, self._limits.max_num_queued_tokens
        if max_reqs is not None and self.num_queued_reqs >= max_reqs:
            raise QueueFullError(
                f"{self.num_queued_reqs} requests are queued; max_num_queued_reqs={max_reqs} allows no more."
            )
        num_tokens = self.num_queued_tokens + num_prompt_tokens
        if max_tokens is not None and self.num_queued_reqs > 0 and num_tokens > max_tokens:
            raise QueueFullError(
                f"{self.num_queued_tokens} prompt tokens are queued; {num_prompt_tokens} more would exceed "
                f"max_num_queued_tokens={max_tokens}."
            )
