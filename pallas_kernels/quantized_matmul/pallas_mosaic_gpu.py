"""The product with packed weights on Hopper's tensor cores.

    out[rows, outputs]^T = weights[outputs, inputs] x activations[rows, inputs]^T

Weights are the left operand whatever their kind: its 64 rows per instruction are outputs, of which there are always
enough, and the right operand's columns are activation rows, which come in eights, so that a decode step of few rows
wastes little. Both operands lie K-minor.

A block is two warpgroups that compute and one that copies; it walks over tiles of the result (persistent). Per step
along K the copying warpgroup brings a tile of packed weights, one of activations and, with groups, the step's scales.

- Weights alone narrow: read packed into registers, converted there, multiplied from registers. Zero points are
  subtracted there, exactly. Scales of groups multiply the group's float32 product, so that nothing is rounded on the
  way, or, in tiles of many rows (`scale_weights`), the weights, which are fewer.
- Both narrow (IGMMA, QGMMA): multiplied as they are, from shared memory. Scales per token and output multiply once at
  the end. With groups, each group's product is scaled and added in float32.
- The tensor cores' accumulator for 8-bit floats keeps about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). So
  their products never stay in it longer than one step, at most 128 inputs: each step's is added in float32.

Results are transposed on their way through shared memory. Parts of K (`splits`) leave as float32 and are added, in
their order, by XLA.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import current_device
from pallas_kernels.mosaic import ACC, Hopper, compiler_params, i32, mma_transforms
from pallas_kernels.quantized_matmul.activations import quantize_activations
from pallas_kernels.quantized_matmul.config import MMA_ROWS, OP_NAME, WARPGROUPS, TileConfig, heuristic, key
from pallas_kernels.quantized_matmul.problem import QuantizedMatmulProblem, problem_of
from pallas_kernels.quantized_matmul.weight import DENSE, QuantizedWeight
from pallas_kernels.tuning import choose_config

_ROWS = plgpu.Layout.WGMMA.reduce(1)  # a number per output
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a number per activation row


def supports(problem: QuantizedMatmulProblem) -> str | None:
    """None, or the reason why the kernel cannot run the problem."""
    if problem.dtype not in ("bfloat16", "float16"):
        return f"activations are {problem.dtype}, tensor cores take bfloat16 or float16"
    if problem.out_dtype not in ("bfloat16", "float16", "float32"):
        return f"results in {problem.out_dtype}"
    if problem.offsets:
        return "weights with offsets"
    if problem.static_activations:
        return "activations quantized by a scale known beforehand"
    if problem.group_size == 16:
        return "groups of 16: a step along K is 32 or more"
    if problem.n % (WARPGROUPS * MMA_ROWS):
        return f"{problem.n} outputs are not a multiple of {WARPGROUPS * MMA_ROWS}"
    if problem.k % 64:
        return f"{problem.k} inputs are not a multiple of 64"
    if problem.rule.activations is not None and problem.group_size == 32:
        return "quantized activations in groups of 32: a step along K is 64 or more"
    return None


def make(simulate: bool) -> dict[str, Any]:
    """The functions of the implementation, see `op.mosaic_gpu`."""
    return {"run": functools.partial(run, simulate=simulate)}


def run(
    x: jax.Array,
    weight: QuantizedWeight,
    out_dtype: Any,
    *,
    simulate: bool = False,
    config: TileConfig | None = None,
    num_cores: int | None = None,
) -> jax.Array:
    """See `api.quantized_matmul`.

    Args:
        x, weight, out_dtype: as there.
        simulate: whether to run in JAX's simulator of a GPU.
        config: tiles; default tuned or guessed.
        num_cores: blocks that run at a time; default the device's, 2 in the simulator.

    Raises:
        ValueError: the tiles cannot run this problem.
    """
    problem = problem_of(x, weight, out_dtype)
    device = current_device()
    tiles = choose_config(OP_NAME, key(problem), TileConfig, device, config, lambda: heuristic(problem, device))
    reason = tiles.refuses(problem)
    if reason is not None:
        raise ValueError(f"{tiles} cannot run {problem}: {reason}")
    cores = num_cores or (2 if simulate else device.num_cores)
    return _run(x, weight, problem, tiles, cores, simulate)


@functools.partial(jax.jit, static_argnames=("problem", "tiles", "num_cores", "simulate"))
def _run(
    x: jax.Array,
    weight: QuantizedWeight,
    problem: QuantizedMatmulProblem,
    tiles: TileConfig,
    num_cores: int,
    simulate: bool,
) -> jax.Array:
    """One trace and one lowered function for all layers of the same shape."""
    padded = jnp.pad(x, ((0, -x.shape[0] % tiles.rows), (0, 0)))
    narrow = problem.rule.activations
    token_scales = None
    if narrow is not None:
        padded, scales = quantize_activations(padded, narrow, problem.group_size)
        token_scales = scales.T  # [G, M]: one step's are one row
    plan = Plan(problem, tiles, padded.shape[0], str(padded.dtype), num_cores, Hopper(simulate))
    operands = {"w": weight.stored, "x": padded, "s": weight.scales, "z": weight.zero_points, "t": token_scales}
    out = launch(plan, {name: array for name, array in operands.items() if array is not None})
    out = out[0] if tiles.splits == 1 else out.sum(0)
    return out[: x.shape[0]].astype(problem.out_dtype)


@dataclass(frozen=True)
class Plan:
    """All that is static about one launch.

    Attributes:
        problem, tiles: as given.
        rows: M, padded.
        dtype: of activations as they are multiplied.
        num_cores: blocks of the grid, at most.
        hopper: words of the body.
        experts: whether each tile of rows has a weight of its own.
    """

    problem: QuantizedMatmulProblem
    tiles: TileConfig
    rows: int
    dtype: str
    num_cores: int
    hopper: Hopper
    experts: bool = False

    @property
    def dense(self) -> bool:
        """Whether weights are not packed: [K, N]."""
        return self.problem.kind == DENSE

    @property
    def weight_only(self) -> bool:
        """Whether weights are converted to the activations' dtype."""
        return self.problem.rule.activations is None and not self.dense

    @property
    def in_groups(self) -> bool:
        """Whether products are scaled step by step."""
        return self.problem.in_groups

    @property
    def in_registers(self) -> bool:
        """Whether sums are values in registers, and not a tensor core's accumulator over all steps."""
        return self.weight_only or self.in_groups or self.problem.is_promoted

    @property
    def group(self) -> int:
        """Inputs of a group."""
        return self.problem.group_size if self.problem.group_size > 0 else self.problem.k

    @property
    def chunk(self) -> int:
        """Inputs of a step that share scales."""
        return min(self.group, self.tiles.inputs)

    @property
    def parts(self) -> tuple[slice, ...]:
        """Of a step's inputs, those that share scales."""
        return tuple(slice(first, first + self.chunk) for first in range(0, self.tiles.inputs, self.chunk))

    @property
    def steps(self) -> int:
        """Along K, of one tile of the result."""
        return self.problem.k // self.tiles.inputs // self.tiles.splits

    @property
    def row_tiles(self) -> int:
        """Tiles along M."""
        return self.rows // self.tiles.rows

    @property
    def output_tiles(self) -> int:
        """Tiles along N."""
        return self.problem.n // self.tiles.outputs

    def place(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(row, split, output) of a tile of the result. Blocks that run together share weights, or rows of experts."""
        fast = self.output_tiles if self.experts else self.row_tiles
        inner, rest = lax.rem(index, i32(fast)), lax.div(index, i32(fast))
        split, outer = lax.rem(rest, i32(self.tiles.splits)), lax.div(rest, i32(self.tiles.splits))
        return (outer, split, inner) if self.experts else (inner, split, outer)

    @property
    def mma_outputs(self) -> int:
        """Outputs of one warpgroup."""
        return self.tiles.outputs // WARPGROUPS

    @property
    def copying_registers(self) -> int:
        """Of a thread that copies; those that compute share the rest, 216 or 224 each. Found by compiling: with 56 the
        copies of up to five arrays spill in some loops of eight steps, with 80 the sums of the largest tiles.
        """
        return 56 if self.tiles.rows * self.mma_outputs >= 128 * 128 else 80

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        """[splits, M, N]."""
        shape = (self.tiles.splits, self.rows, self.problem.n)
        return jax.ShapeDtypeStruct(shape, self.problem.out_dtype if self.tiles.splits == 1 else jnp.float32)

    def specs(self, split: jax.Array) -> dict[str, plgpu.BlockSpec]:
        """What one step copies, of operands already narrowed to the block's outputs and rows."""
        tiles, first = self.tiles, split * i32(self.steps)
        specs = {
            "w": plgpu.BlockSpec(
                (tiles.inputs, tiles.outputs) if self.dense else (tiles.outputs, tiles.inputs),
                lambda k: (first + k, 0) if self.dense else (0, first + k),
                transforms=mma_transforms(self.mma_outputs if self.dense else tiles.inputs, self.problem.rule.dtype),
            ),
            "x": plgpu.BlockSpec(
                (tiles.rows, tiles.inputs), lambda k: (0, first + k), transforms=mma_transforms(self.chunk, self.dtype)
            ),
        }
        if self.in_groups:
            scales = tiles.inputs // self.chunk
            steps = i32(max(self.group // tiles.inputs, 1))  # that share scales
            specs["s"] = plgpu.BlockSpec((scales, tiles.outputs), lambda k: (lax.div(first + k, steps), 0))
            if self.problem.zero_points:
                specs["z"] = specs["s"]
            if not self.weight_only:
                specs["t"] = plgpu.BlockSpec((scales, tiles.rows), lambda k: (lax.div(first + k, steps), 0))
        return specs


def launch(plan: Plan, operands: dict[str, jax.Array]) -> jax.Array:
    """Launches the kernel.

    Args:
        plan: of the launch.
        operands: by name. w: weights [N, K], or [K, N] if dense; x: activations [M, K]; s: scales [G, N]; z: zero
            points [G, N]; t: scales of tokens [G, M]. With experts, E lead w, s and z, and there are e: int32[I], the
            expert of each of I tiles of rows, and c: int32[1], how many of them to compute.

    Returns:
        [splits, M, N].
    """
    tiles, names = plan.tiles, tuple(operands)

    def body(*refs: Any) -> None:
        *inputs, out, out_smem = refs
        refs_of = dict(zip(names, inputs, strict=True))
        first = plan.specs(i32(0))
        narrowed = {name: _narrow(plan, name, ref, i32(0), i32(0), i32(0)) for name, ref in refs_of.items()}

        def ignore(*_: Any, **__: Any) -> None:
            return None

        allocations = _pipeline(plan, first, ignore, ignore).get_allocations(*(narrowed[name] for name in first))

        @functools.partial(pl.run_scoped, allocations=allocations, collective_axes="wg")
        def _scope(allocations: Any) -> None:
            live = refs_of["c"][0] if plan.experts else i32(plan.row_tiles)

            @plgpu.nd_loop((live * i32(tiles.splits * plan.output_tiles),), collective_axes="core")
            def _tile(loop: plgpu.NDLoopInfo) -> None:
                row, split, output = plan.place(loop.index[0])
                expert = refs_of["e"][row] if plan.experts else i32(0)
                mine = {name: _narrow(plan, name, ref, expert, row, output) for name, ref in refs_of.items()}
                rows = pl.ds(row * tiles.rows, tiles.rows)
                outputs = pl.ds(output * tiles.outputs, tiles.outputs)
                _compute_tile(plan, split, mine, out.at[split, rows, outputs], out_smem, allocations)

        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=plan.out_type,
        grid=(min(plan.num_cores, plan.row_tiles * tiles.splits * plan.output_tiles),),
        grid_names=("core",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM(
                (WARPGROUPS, tiles.rows, plan.mma_outputs),
                plan.out_type.dtype,
                transforms=mma_transforms(plan.mma_outputs, plan.out_type.dtype),
            )
        ],
        compiler_params=compiler_params(),
        interpret=plan.hopper.interpret,
    )(*operands.values())


def _narrow(plan: Plan, name: str, ref: Any, expert: jax.Array, row: jax.Array, output: jax.Array) -> Any:
    """An operand in global memory, narrowed to what one tile of the result needs."""
    rows = pl.ds(row * plan.tiles.rows, plan.tiles.rows)
    outputs = pl.ds(output * plan.tiles.outputs, plan.tiles.outputs)
    if name in "wsz" and plan.experts:
        ref = ref.at[expert]
    match name:
        case "x":
            return ref.at[rows]
        case "w" if not plan.dense:
            return ref.at[outputs]
        case "w" | "s" | "z":
            return ref.at[:, outputs]
        case "t":
            return ref.at[:, rows]
        case _:
            return ref


def _pipeline(plan: Plan, specs: dict[str, plgpu.BlockSpec], step: Any, context: Any) -> Any:
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(plan.steps,),
        memory_registers=plan.copying_registers,
        wg_axis="wg",
        num_compute_wgs=WARPGROUPS,
        max_concurrent_steps=plan.tiles.stages,
        compute_context=context,
        in_specs=list(specs.values()),
    )


def _compute_tile(
    plan: Plan, split: jax.Array, refs: dict[str, Any], target: Any, out_smem: Any, allocations: Any
) -> None:
    """One tile of the result: `refs` in global memory, narrowed to its outputs and rows."""
    hopper, shape = plan.hopper, (plan.mma_outputs, plan.tiles.rows)
    warpgroup = lax.axis_index("wg")
    own = pl.ds(warpgroup * plan.mma_outputs, plan.mma_outputs)
    specs = plan.specs(split)

    def step(_: Any, *tiles: Any) -> Any:
        *buffers, total = tiles
        return _step(plan, dict(zip(specs, buffers, strict=True)), own, total)

    def finish(total: jax.Array) -> None:
        total = total.astype(jnp.float32)
        if not plan.in_groups and not plan.dense:
            scales = hopper.load(refs["s"].at[0, own], _ROWS, optimized=False).astype(jnp.float32)
            total = total * lax.broadcast_in_dim(scales, shape, [0])
            if not plan.weight_only:
                tokens = hopper.load(refs["t"].at[0], _COLUMNS, optimized=False)
                total = total * lax.broadcast_in_dim(tokens, shape, [1])
        total = total.astype(out_smem.dtype)
        buffer = out_smem.at[warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's copy out of this buffer
        if hopper.simulate:
            buffer[...] = total.T
        else:
            buffer.transpose((1, 0))[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, target.at[:, own])

    def context(evaluate: Any) -> None:
        if plan.in_registers:
            finish(evaluate(hopper.cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)))
            return
        dtype = jnp.int32 if plan.dtype == "int8" else jnp.float32

        @functools.partial(pl.run_scoped, accumulator=ACC(shape, dtype))
        def _accumulate(accumulator: Any) -> None:
            evaluate(accumulator)
            finish(accumulator[...])

    _pipeline(plan, specs, step, context)(*(refs[name] for name in specs), allocations=allocations)


def _step(plan: Plan, buffers: dict[str, Any], own: Any, total: Any) -> Any:
    """One step along K of one warpgroup: `total`, a value or the accumulator, plus the step's products."""
    hopper, activations = plan.hopper, buffers["x"].transpose((1, 0))
    if not plan.in_registers:
        weights = buffers["w"].at[:, own].transpose((1, 0)) if plan.dense else buffers["w"].at[own]
        plgpu.wgmma(total, weights, activations)
        plgpu.wgmma_wait(0)
        return total
    weights = hopper.load_narrow(buffers["w"].at[own], plan.dtype) if plan.weight_only else None
    if plan.problem.is_promoted:
        shape = (plan.mma_outputs, plan.tiles.rows)
        total = total + hopper.dot(buffers["w"].at[own], activations, shape)
    elif weights is not None and not plan.in_groups:
        total = hopper.add_dot(total, weights, activations)
    elif weights is not None and plan.tiles.scale_weights:
        for index, part in enumerate(plan.parts):
            scales = hopper.cast(buffers["s"][index, own].astype(plan.dtype), _ROWS)
            chunk = _less_zero_points(plan, buffers, own, index, weights[:, part])
            total = hopper.add_dot(total, chunk * lax.broadcast_in_dim(scales, chunk.shape, [0]), activations.at[part])
    else:
        for index in range(len(plan.parts)):
            total = total + _group_product(plan, buffers, own, index, weights)
    # Threads have read the buffers; the copies that will reuse them go through another proxy.
    plgpu.commit_smem()
    return total


def _group_product(plan: Plan, buffers: dict[str, Any], own: Any, index: int, weights: jax.Array | None) -> jax.Array:
    """The scaled product of one group, or of the part of it that a step covers: the step's `index`-th."""
    hopper, shape = plan.hopper, (plan.mma_outputs, plan.tiles.rows)
    activations = buffers["x"].transpose((1, 0))
    scales = hopper.cast(buffers["s"][index, own].astype(jnp.float32), _ROWS)
    scales = lax.broadcast_in_dim(scales, shape, [0])
    if weights is None:
        product = hopper.dot(buffers["w"].at[own], activations, shape, _accumulator_dtype(plan)).astype(jnp.float32)
        tokens = hopper.cast(buffers["t"][index], _COLUMNS)
        return product * (scales * lax.broadcast_in_dim(tokens, shape, [1]))
    part = plan.parts[index]
    chunk = _less_zero_points(plan, buffers, own, index, weights[:, part])
    return hopper.dot_registers(chunk, activations.at[part], shape) * scales


def _less_zero_points(plan: Plan, buffers: dict[str, Any], own: Any, index: int, chunk: jax.Array) -> jax.Array:
    """The weights of the step's `index`-th group minus their zero points."""
    if not plan.problem.zero_points:
        return chunk
    zeros = plan.hopper.cast(buffers["z"][index, own].astype(plan.dtype), _ROWS)
    return chunk - lax.broadcast_in_dim(zeros, chunk.shape, [0])


def _accumulator_dtype(plan: Plan) -> Any:
    return jnp.int32 if plan.dtype == "int8" else jnp.float32
