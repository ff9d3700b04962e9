"""What the executables of an engine are made from, and the list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from engine.config import KernelConfig
from engine.runtime.buckets import Bucket, BucketTable
from engine.runtime.compile import lower, shapes_of
from engine.runtime.device_state import ForwardState, SampleState, make_forward_state, make_sample_state
from engine.runtime.drafting.drafter import DeviceDrafter, JobShapes
from engine.runtime.drafting.steps import draft_step, observe_step
from engine.runtime.filling import Job
from engine.runtime.limits import RuntimeLimits
from engine.runtime.lookup import by_need
from engine.runtime.packing import UPDATE_WIDTH, StepLayout
from engine.runtime.pooling import POOL_ROWS, pool_rows
from engine.runtime.sampling import SamplerVariant, make_state, state_size_bytes, warm_up_rows
from engine.runtime.sampling.inputs import WIDTH
from engine.runtime.step import (
    PROMPT_LOGPROB_ROWS,
    forward,
    mask_logits,
    sample_step,
    score_prompt,
    update_tables,
    verify_step,
)
from engine.structured.masks import mask_width
from models.config import ModelConfig
from models.decoder import Decoder
from models.functional import FunctionalModel, Params
from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.paged_attention import AttentionProblem

DEFAULT_KERNELS = KernelConfig()
TABLE_UPDATES = 1024  # block table entries per extra update call
STATE = ("state",)


def attention_problem(config: ModelConfig, limits: RuntimeLimits, kernels: KernelConfig) -> AttentionProblem:
    """The attention of a decoder's layers over the engine's pages."""
    return AttentionProblem(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=limits.block_size,
        dtype=limits.dtype,
        kv_dtype=limits.kv_dtype,
        implementation=kernels.attention_implementation,
    )


def structure_of(
    config: ModelConfig, limits: RuntimeLimits, kernels: KernelConfig, *, lazy: bool = False
) -> FunctionalModel[Decoder]:
    """A decoder's structure: what it is, and what runs its attention and its products."""
    problem = attention_problem(config, limits, kernels)
    build = partial(Decoder, config, problem, dtype=limits.dtype, matmul=kernels.matmul_implementation)
    return FunctionalModel(build, lazy=lazy)


@dataclass(frozen=True)
class ModelProgram:
    """What executables are made from.

    Attributes:
        model: the decoder's structure.
        config: of the decoder.
        limits: sizes.
        cache: pages of one layer.
        kernels: implementations.
        drafter: makes guesses on the device, if anything does.
    """

    model: FunctionalModel[Decoder]
    config: ModelConfig
    limits: RuntimeLimits
    cache: KVLayout
    kernels: KernelConfig = DEFAULT_KERNELS
    drafter: DeviceDrafter | None = None

    @classmethod
    def of(
        cls, config: ModelConfig, limits: RuntimeLimits, num_pages: int, kernels: KernelConfig = DEFAULT_KERNELS
    ) -> ModelProgram:
        """The program of a model's config.

        Args:
            num_pages: KV blocks, the null block included.
            kernels: implementations.
        """
        cache = KVLayout(num_pages, config.num_kv_heads, limits.block_size, config.head_dim, limits.kv_dtype)
        return cls(structure_of(config, limits, kernels), config, limits, cache, kernels)

    def with_pages(self, num_pages: int) -> ModelProgram:
        """The same with another number of KV blocks."""
        return replace(self, cache=replace(self.cache, num_pages=num_pages))

    def make_state(self) -> tuple[ForwardState, SampleState]:
        """Fresh device state."""
        rows = self.limits.max_num_seqs
        forward_state = make_forward_state(self.cache, self.config.num_layers, rows, self.limits.max_blocks_per_seq)
        sampler = warm_up_rows(make_state(rows, self.config.vocab_size, len(self.config.eos_token_ids)))
        return forward_state, make_sample_state(rows, sampler)

    def state_shapes(self) -> tuple[ForwardState, SampleState]:
        """Shapes and dtypes of `make_state`, with no memory behind them."""
        rows = self.limits.max_num_seqs
        blocks = self.limits.max_blocks_per_seq
        forward_state = jax.eval_shape(lambda: make_forward_state(self.cache, self.config.num_layers, rows, blocks))
        sampler = jax.eval_shape(lambda: make_state(rows, self.config.vocab_size, len(self.config.eos_token_ids)))
        return forward_state, jax.eval_shape(lambda s: make_sample_state(rows, s), sampler)

    def make_draft_state(self) -> Any:
        """Fresh state of the drafter; () without one."""
        return () if self.drafter is None else self.drafter.make_state(self.cache.num_pages, self.limits.max_num_seqs)

    @property
    def taps(self) -> tuple[int, ...]:
        """After how many layers the drafter wants to see the residual stream."""
        return () if self.drafter is None else self.drafter.taps

    @property
    def block_bytes(self) -> int:
        """Of one KV block, all layers, the drafter's included."""
        return self.cache.page_bytes * self.config.num_layers + (
            0 if self.drafter is None else self.drafter.block_bytes
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of the device state besides the KV cache."""
        rows = self.limits.max_num_seqs
        tables = (rows + 1) * (self.limits.max_blocks_per_seq + 1) * 4
        return tables + state_size_bytes(rows, self.config.vocab_size, len(self.config.eos_token_ids))

    @property
    def buckets(self) -> BucketTable:
        """The step shapes."""
        return BucketTable(self.limits.max_num_batched_tokens, self.limits.max_num_seqs, self.limits.num_drafts)

    def layout(self, bucket: Bucket) -> StepLayout:
        """The packed array of a bucket."""
        return StepLayout(bucket, self.limits.block_size, self.limits.max_num_seqs)

    def lower_forward(self, bucket: Bucket, params: Params) -> Any:
        """Trace and lower the forward pass of one bucket (no device memory is touched: shapes are enough)."""
        state, sample_state = self.state_shapes()
        layout = self.layout(bucket)
        packed = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        shapes = (shapes_of(params), state, sample_state.rows, packed, self._draft_ids(bucket))
        return lower(forward, *shapes, donate=STATE, model=self.model, layout=layout, taps=self.taps)

    def lower_sample(self, num_seqs: int, variant: SamplerVariant) -> Any:
        """Trace and lower the sampling of so many sequences."""
        _, state = self.state_shapes()
        logits = jax.ShapeDtypeStruct((num_seqs, self.config.vocab_size), jnp.float32)
        sampling = jax.ShapeDtypeStruct((num_seqs, WIDTH), jnp.int32)
        return lower(sample_step, logits, sampling, state, donate=STATE, variant=variant)

    def lower_verify(self, bucket: Bucket, variant: SamplerVariant) -> Any:
        """Trace and lower the verification of a bucket's drafts."""
        _, state = self.state_shapes()
        logits = jax.ShapeDtypeStruct((bucket.num_logit_rows, self.config.vocab_size), jnp.float32)
        sampling = jax.ShapeDtypeStruct((bucket.num_seqs, WIDTH + bucket.num_logits), jnp.int32)
        return lower(verify_step, logits, sampling, state, donate=STATE, variant=variant)

    def _draft_ids(self, bucket: Bucket) -> jax.ShapeDtypeStruct | None:
        if self.drafter is None or bucket.num_logits == 1:
            return None
        return jax.ShapeDtypeStruct((bucket.num_seqs, bucket.num_logits - 1), jnp.int32)

    def lower_draft(self, bucket: Bucket, variant: SamplerVariant) -> Any:
        """Trace and lower the drafts of a verify bucket."""
        assert self.drafter is not None
        state, sample_state = self.state_shapes()
        layout = self.layout(bucket)
        packed = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        shapes = (shapes_of(self.drafter.weights), state, self._draft_state_shapes, sample_state.rows, packed)
        donate = ("state", "draft_state")
        return lower(draft_step, *shapes, donate=donate, drafter=self.drafter, layout=layout, variant=variant)

    def lower_observe(self, bucket: Bucket) -> Any:
        """Trace and lower what the drafter notes of a bucket's step."""
        assert self.drafter is not None
        state, sample_state = self.state_shapes()
        layout = self.layout(bucket)
        packed = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        width = max(1, len(self.taps)) * self.config.hidden_size
        hidden = jax.ShapeDtypeStruct((bucket.num_tokens, width), self.limits.dtype)
        shapes = (
            shapes_of(self.drafter.weights),
            self._draft_state_shapes,
            state.block_tables,
            sample_state.rows,
            packed,
            self._draft_ids(bucket),
            hidden,
        )
        return lower(observe_step, *shapes, donate=("draft_state",), drafter=self.drafter, layout=layout)

    @property
    def _draft_state_shapes(self) -> Any:
        return jax.eval_shape(self.make_draft_state)

    def draft_jobs(self) -> list[tuple[Any, str, Callable[[], Any]]]:
        """What the drafter needs: (key, name, function that lowers)."""
        drafter = self.drafter
        if drafter is None:
            return []
        state, sample_state = self.state_shapes()
        shapes = JobShapes(self._draft_state_shapes, state.block_tables, sample_state.rows, self.buckets, self.layout)
        jobs = list(drafter.jobs(shapes))
        for bucket in self.buckets.verify():
            for variant in (SamplerVariant.GREEDY, SamplerVariant.RANDOM):
                name = f"{variant.name.lower()} drafts of {bucket.num_seqs} sequences"
                jobs.append((("draft", bucket, variant), name, partial(self.lower_draft, bucket, variant)))
        if drafter.observes:
            for bucket in self.buckets.all():
                name = f"notes of {bucket.num_tokens} tokens of {bucket.num_seqs} sequences"
                jobs.append((("observe", bucket), name, partial(self.lower_observe, bucket)))
        return jobs

    def lower_mask(self, num_rows: int) -> Any:
        """Trace and lower the grammar mask of so many rows of logits."""
        logits = jax.ShapeDtypeStruct((num_rows, self.config.vocab_size), jnp.float32)
        mask = jax.ShapeDtypeStruct((num_rows, mask_width(self.config.vocab_size)), jnp.int32)
        return lower(mask_logits, logits, mask, donate=("logits",))

    @property
    def largest(self) -> Bucket:
        """The bucket with the most work space."""
        return max(self.buckets.all())

    def jobs(self, params: Params) -> list[Job]:
        """Every executable, those first that a first request meets. Nothing is traced before a job is run.

        Args:
            params: weights, or their shapes.
        """
        buckets, jobs = self.buckets, list[Job]()
        for bucket in buckets.all():
            name = f"forward, {bucket.num_tokens} tokens of {bucket.num_seqs} sequences"
            name += f", {bucket.num_logits} logits of each" if bucket.num_logits > 1 else ""
            jobs.append(Job(("forward", bucket), name, partial(self.lower_forward, bucket, params)))
        for seqs in sorted({b.num_seqs for b in buckets.all()}):
            for variant in SamplerVariant:
                name = f"{variant.name.lower()} sampling of {seqs} sequences"
                jobs.append(Job(("sample", seqs, variant), name, partial(self.lower_sample, seqs, variant)))
        for bucket in buckets.verify():
            for variant in SamplerVariant:
                name = f"{variant.name.lower()} verification of {bucket.num_seqs} sequences"
                jobs.append(Job(("verify", bucket, variant), name, partial(self.lower_verify, bucket, variant)))
        jobs += [Job(key, name, lowered) for key, name, lowered in self.draft_jobs()]
        for rows in sorted({b.num_logit_rows for b in buckets.all()}):
            jobs.append(Job(("mask", rows), f"grammar masks of {rows} rows", partial(self.lower_mask, rows)))
        jobs.append(Job("score", "prompt scores", partial(self.lower_score, params)))
        for tokens in sorted({b.num_tokens for b in buckets.all()}):
            jobs.append(Job(("pool", tokens), f"pooling of {tokens} tokens", partial(self.lower_pool, tokens)))
        jobs.append(Job("update_tables", "block table updates", self.lower_update_tables))
        return by_need(jobs, self.buckets)

    def lower_score(self, params: Params) -> Any:
        """Trace and lower the scores of a part of a prompt."""
        hidden = jax.ShapeDtypeStruct((PROMPT_LOGPROB_ROWS, self.config.hidden_size), self.limits.dtype)
        targets = jax.ShapeDtypeStruct((PROMPT_LOGPROB_ROWS,), jnp.int32)
        return lower(score_prompt, shapes_of(params), hidden, targets, model=self.model)

    def lower_pool(self, num_tokens: int) -> Any:
        """Trace and lower the sums over ranges of a step's hidden states."""
        states = jax.ShapeDtypeStruct((num_tokens, self.config.hidden_size), self.limits.dtype)
        return lower(pool_rows, states, jax.ShapeDtypeStruct((POOL_ROWS, 2), jnp.int32))

    def lower_update_tables(self) -> Any:
        """Trace and lower the update of block tables that a step's own array has no room for."""
        updates = jax.ShapeDtypeStruct((TABLE_UPDATES, UPDATE_WIDTH), jnp.int32)
        return lower(update_tables, self.state_shapes()[0], updates, donate=STATE)
