"""Executables by shape, and in which order they are made."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from engine.runtime.buckets import Bucket, BucketTable
from engine.runtime.filling import Compiled, Filling, FillingStats, Job
from engine.runtime.progress import Report
from engine.runtime.sampling import SamplerVariant

FIRST_PROMPT_TOKENS = 64  # most first prompts are no longer
KINDS = ("sample", "forward", "mask", "update_tables", "score", "pool")  # of the rest, in this order; others last


def first_keys(table: BucketTable) -> list[Hashable]:
    """What a first request needs: a prompt of `FIRST_PROMPT_TOKENS` alone, then a token at a time."""
    alone = Bucket(1, 1)
    prompt = table.choose(min(FIRST_PROMPT_TOKENS, table.max_num_tokens), 1)
    return _with_sampling([alone, prompt], list(SamplerVariant))


def hull_keys(table: BucketTable) -> list[Hashable]:
    """What any step of decoding, and any step at all, fits in: with these nothing has to wait."""
    decode = Bucket(table.max_num_seqs, table.max_num_seqs)
    largest = table.choose(table.max_num_tokens, table.max_num_seqs)
    return _with_sampling([decode, largest], [SamplerVariant.GREEDY, SamplerVariant.RANDOM])


def _with_sampling(buckets: Sequence[Bucket], variants: Sequence[SamplerVariant]) -> list[Hashable]:
    sizes = {bucket.num_seqs for bucket in buckets}
    sampling = [("sample", size, variant) for size in sorted(sizes) for variant in variants]
    return [*(("forward", bucket) for bucket in buckets), *sampling]


def by_need(jobs: Sequence[Job], table: BucketTable) -> list[Job]:
    """Jobs in the order in which they will be wanted: those of a first request, those that hold any step, the rest."""
    early = {key: place for place, key in enumerate(dict.fromkeys([*first_keys(table), *hull_keys(table)]))}

    def place(job: Job) -> tuple[int, int]:
        kind = job.key[0] if isinstance(job.key, tuple) else job.key
        return early.get(job.key, len(early)), KINDS.index(kind) if kind in KINDS else len(KINDS)

    return sorted(jobs, key=place)  # stable: within a kind as it was


class Executables:
    """Compiled functions by shape. Looking one up that is not there yet waits for it; one that nobody planned is a
    defect and raises KeyError.

    Args:
        filling: makes them; it has been started.
    """

    def __init__(self, filling: Filling) -> None:
        self._filling = filling
        self._ready = filling.ready

    def __len__(self) -> int:
        return self.stats.num_all

    @property
    def stats(self) -> FillingStats:
        """How many there are."""
        return self._filling.stats

    def wait_for_all(self) -> None:
        """Return when all of them are there.

        Raises:
            Exception: as making one of them raised.
        """
        self._filling.wait_for_all()

    def wait_for_first(self, table: BucketTable, report: Report, *, background: bool) -> None:
        """Wait for what has to be there before an engine is ready: with `background` what a first request needs, else
        all.

        Raises:
            Exception: as making one of them raised.
        """
        self._filling.wait_for_first(first_keys(table) if background else self._filling.keys, report)

    def by_name(self) -> dict[str, Compiled]:
        """All of them, by the names of their jobs; waits for them."""
        self.wait_for_all()
        return self._filling.by_name()

    def close(self) -> None:
        """Make no more of them."""
        self._filling.stop()

    def choose(self, table: BucketTable, num_tokens: int, num_seqs: int, num_drafts: int = 0) -> Bucket:
        """The cheapest bucket that holds a step and is there; the cheapest one if none is there yet.

        Raises:
            ValueError: as `BucketTable.choose`.
        """
        wanted = table.choose(num_tokens, num_seqs, num_drafts)
        if ("forward", wanted) in self._ready or num_drafts or self._filling.done:
            return wanted
        larger = (b for b in table.holding(num_tokens, num_seqs) if ("forward", b) in self._ready)
        return next(larger, wanted)

    def _get(self, key: Hashable) -> Compiled:
        found = self._ready.get(key)
        return self._filling.wait_for(key) if found is None else found

    def forward(self, bucket: Bucket) -> Compiled:
        """(params, state, known, packed, draft_ids) -> (hidden, logits, sampling, state, streams)."""
        return self._get(("forward", bucket))

    def draft(self, bucket: Bucket, variant: SamplerVariant) -> Compiled:
        """(weights, state, draft_state, known, packed) -> (draft_ids, state, draft_state)."""
        least = SamplerVariant.GREEDY if variant is SamplerVariant.GREEDY else SamplerVariant.RANDOM
        return self._get(("draft", bucket, least))

    def observe(self, bucket: Bucket) -> Compiled:
        """(weights, draft_state, block_tables, known, packed, draft_ids, hidden) -> draft_state."""
        return self._get(("observe", bucket))

    def of_drafter(self, key: Any) -> Compiled:
        """One of `DeviceDrafter.jobs`."""
        return self._get(key)

    def sample(self, num_seqs: int, variant: SamplerVariant) -> Compiled:
        """(logits, sampling, state) -> (sampled, state)."""
        return self._get(("sample", num_seqs, variant))

    def verify(self, bucket: Bucket, variant: SamplerVariant) -> Compiled:
        """(logits, sampling, state) -> (sampled, state)."""
        return self._get(("verify", bucket, variant))

    def mask(self, num_rows: int) -> Compiled:
        """(logits, mask) -> logits."""
        return self._get(("mask", num_rows))

    def pool(self, num_tokens: int) -> Compiled:
        """(hidden [T, E], ranges [P, 2]) -> sums [P, E], P = `POOL_ROWS`."""
        return self._get(("pool", num_tokens))

    @property
    def score(self) -> Compiled:
        """(params, hidden [C, E], targets [C]) -> (logits, scores), C = `PROMPT_LOGPROB_ROWS`."""
        return self._get("score")

    @property
    def update_tables(self) -> Compiled:
        """(state, updates) -> state."""
        return self._get("update_tables")
