"""All executables of an engine, compiled ahead of the first request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from typing import Any

import jax
import jax.numpy as jnp

from engine.config import CompileConfig, KernelConfig
from engine.runtime.buckets import Bucket, BucketTable
from engine.runtime.compile import compile_all
from engine.runtime.device_state import ForwardState, SampleState, make_forward_state, make_sample_state
from engine.runtime.limits import RuntimeLimits
from engine.runtime.packing import UPDATE_WIDTH, StepLayout
from engine.runtime.pooling import POOL_ROWS, pool_rows
from engine.runtime.progress import Report
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
Compiled = Callable[..., Any]


def _lower(jitted: Any, *args: Any, donate: tuple[str, ...] = (), **static: Any) -> Any:
    """Trace and lower a jitted function under a function object of its own.

    JAX's caches keep an executable for as long as the function that it was compiled from lives: under the function of
    the module that is for ever, and on a CPU each takes some fifty memory mappings, of which Linux grants a process
    65,530. This one goes with its engine.

    Args:
        jitted: by `jax.jit`.
        args: shapes and dtypes.
        donate: names of arguments, as `jitted` has them.
        static: arguments that are fixed.
    """
    function = jitted.__wrapped__
    alone = update_wrapper(partial(function, **static), function)
    del alone.__wrapped__  # its signature is without the static arguments
    return jax.jit(alone, donate_argnames=donate).lower(*args)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@dataclass(frozen=True)
class ModelProgram:
    """What executables are made from.

    Attributes:
        model: the decoder's structure.
        config: of the decoder.
        limits: sizes.
        cache: pages of one layer.
    """

    model: FunctionalModel[Decoder]
    config: ModelConfig
    limits: RuntimeLimits
    cache: KVLayout

    @classmethod
    def of(
        cls, config: ModelConfig, limits: RuntimeLimits, num_pages: int, kernels: KernelConfig = DEFAULT_KERNELS
    ) -> ModelProgram:
        """The program of a model's config.

        Args:
            num_pages: KV blocks, the null block included.
            kernels: implementations.
        """
        problem = AttentionProblem(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_size=limits.block_size,
            dtype=limits.dtype,
            kv_dtype=limits.kv_dtype,
            implementation=kernels.attention_implementation,
        )
        cache = KVLayout(num_pages, config.num_kv_heads, limits.block_size, config.head_dim, limits.kv_dtype)
        matmul = kernels.matmul_implementation
        build = partial(Decoder, config, problem, dtype=limits.dtype, matmul=matmul)
        return cls(FunctionalModel(build), config, limits, cache)

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
        shapes = (_shapes(params), state, sample_state.rows, packed)
        return _lower(forward, *shapes, donate=STATE, model=self.model, layout=layout)

    def lower_sample(self, num_seqs: int, variant: SamplerVariant) -> Any:
        """Trace and lower the sampling of so many sequences."""
        _, state = self.state_shapes()
        logits = jax.ShapeDtypeStruct((num_seqs, self.config.vocab_size), jnp.float32)
        sampling = jax.ShapeDtypeStruct((num_seqs, WIDTH), jnp.int32)
        return _lower(sample_step, logits, sampling, state, donate=STATE, variant=variant)

    def lower_verify(self, bucket: Bucket, variant: SamplerVariant) -> Any:
        """Trace and lower the verification of a bucket's drafts."""
        _, state = self.state_shapes()
        logits = jax.ShapeDtypeStruct((bucket.num_logit_rows, self.config.vocab_size), jnp.float32)
        sampling = jax.ShapeDtypeStruct((bucket.num_seqs, WIDTH + bucket.num_logits), jnp.int32)
        return _lower(verify_step, logits, sampling, state, donate=STATE, variant=variant)

    def lower_mask(self, num_rows: int) -> Any:
        """Trace and lower the grammar mask of so many rows of logits."""
        logits = jax.ShapeDtypeStruct((num_rows, self.config.vocab_size), jnp.float32)
        mask = jax.ShapeDtypeStruct((num_rows, mask_width(self.config.vocab_size)), jnp.int32)
        return _lower(mask_logits, logits, mask, donate=("logits",))

    @property
    def largest(self) -> Bucket:
        """The bucket with the most work space."""
        return max(self.buckets.all())


class Executables:
    """Compiled functions by shape. Looking one up that was not compiled is a defect and raises KeyError."""

    def __init__(self, compiled: dict[Any, Compiled]) -> None:
        self._compiled = compiled

    def __len__(self) -> int:
        return len(self._compiled)

    def forward(self, bucket: Bucket) -> Compiled:
        """(params, state, known, packed) -> (hidden, logits, sampling, state)."""
        return self._compiled["forward", bucket]

    def sample(self, num_seqs: int, variant: SamplerVariant) -> Compiled:
        """(logits, sampling, state) -> (sampled, state)."""
        return self._compiled["sample", num_seqs, variant]

    def verify(self, bucket: Bucket, variant: SamplerVariant) -> Compiled:
        """(logits, sampling, state) -> (sampled, state)."""
        return self._compiled["verify", bucket, variant]

    def mask(self, num_rows: int) -> Compiled:
        """(logits, mask) -> logits."""
        return self._compiled["mask", num_rows]

    def pool(self, num_tokens: int) -> Compiled:
        """(hidden [T, E], ranges [P, 2]) -> sums [P, E], P = `POOL_ROWS`."""
        return self._compiled["pool", num_tokens]

    @property
    def score(self) -> Compiled:
        """(params, hidden [C, E], targets [C]) -> (logits, scores), C = `PROMPT_LOGPROB_ROWS`."""
        return self._compiled["score"]

    @property
    def update_tables(self) -> Compiled:
        """(state, updates) -> state."""
        return self._compiled["update_tables"]


def compile_program(program: ModelProgram, params: Params, config: CompileConfig, report: Report) -> Executables:
    """Compile every bucket, those first that a first request meets."""
    forward_state, _ = program.state_shapes()
    buckets = program.buckets

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    jobs: list[tuple[Any, str, Compiled]] = []

    def job(key: Any, name: str, lower: Callable[[], Any]) -> None:
        jobs.append((key, name, lambda: lower().compile()))

    for bucket in buckets.all():
        name = f"forward, {bucket.num_tokens} tokens of {bucket.num_seqs} sequences"
        job(("forward", bucket), name, partial(program.lower_forward, bucket, params))
    for seqs in sorted({b.num_seqs for b in buckets.all()}):
        for variant in SamplerVariant:
            name = f"{variant.name.lower()} sampling of {seqs} sequences"
            job(("sample", seqs, variant), name, partial(program.lower_sample, seqs, variant))
    for bucket in buckets.verify():
        for variant in SamplerVariant:
            name = f"{variant.name.lower()} verification of {bucket.num_seqs} sequences"
            job(("verify", bucket, variant), name, partial(program.lower_verify, bucket, variant))
    for rows in sorted({b.num_logit_rows for b in buckets.all()}):
        job(("mask", rows), f"grammar masks of {rows} rows", partial(program.lower_mask, rows))
    hidden = array((PROMPT_LOGPROB_ROWS, program.config.hidden_size), program.limits.dtype)
    targets = array((PROMPT_LOGPROB_ROWS,), jnp.int32)
    job("score", "prompt scores", partial(_lower, score_prompt, _shapes(params), hidden, targets, model=program.model))
    ranges = array((POOL_ROWS, 2), jnp.int32)
    for tokens in sorted({b.num_tokens for b in buckets.all()}):
        states = array((tokens, program.config.hidden_size), program.limits.dtype)
        job(("pool", tokens), f"pooling of {tokens} tokens", partial(_lower, pool_rows, states, ranges))
    updates = array((TABLE_UPDATES, UPDATE_WIDTH), jnp.int32)
    job("update_tables", "block table updates", partial(_lower, update_tables, forward_state, updates, donate=STATE))
    return Executables(compile_all(jobs, config, report))
