"""Thousands of random requests through the toy device: every token right, nothing leaked."""

import pytest

from tests.scheduling.toy import ToyEngine, make_limits, run_random

# Name, limits, blocks: tiny pools force preemption and eviction, large ones let prefixes live long.
WORKLOADS = {
    "tiny_pool": ({}, 9),
    "no_chunks": ({"enable_chunked_prefill": False, "max_num_batched_tokens": 40}, 12),
    "no_chunks_small_budget": ({"enable_chunked_prefill": False}, 12),
    "no_prefix_caching": ({"enable_prefix_caching": False}, 14),
    "priority": ({"policy": "priority", "max_num_seqs": 8}, 17),
    "threshold": ({"long_prefill_token_threshold": 3}, 17),
    "block_of_one": ({"block_size": 1, "max_num_batched_tokens": 8}, 60),
    "many_rows": ({"max_num_seqs": 16, "max_num_batched_tokens": 48, "block_size": 8}, 16),
    "large_pool": ({"max_num_seqs": 8, "max_num_batched_tokens": 24}, 200),
}


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("name", WORKLOADS)
def test_random_requests(name, depth):
    changes, num_blocks = WORKLOADS[name]
    engine = ToyEngine(make_limits(**changes), num_blocks, depth)
    run_random(engine, 120, seed=depth)
    stats = engine.scheduler.stats()
    assert stats.num_preemptions > 0 or name == "large_pool", "the workload does not do what it is for"
    assert stats.num_prefix_hit_tokens > 0


FAST = ("tiny_pool", "priority", "block_of_one")


@pytest.mark.parametrize(
    ("depth", "drafts_by"), [(0, "host"), (1, "host"), (0, "device"), (1, "device"), (2, "device")]
)
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in WORKLOADS])
def test_random_requests_with_drafts(name, depth, drafts_by):
    """Guesses of either side, right, wrong and mixed, verified by steps that are planned one upon another."""
    changes, num_blocks = WORKLOADS[name]
    engine = ToyEngine(make_limits(**changes), num_blocks, depth)
    run_random(engine, 60, depth, drafts_by)
    sequences = list(engine.truths)
    num_drafted = sum(sequence.num_drafted for sequence in sequences)
    num_right = sum(sequence.num_accepted for sequence in sequences)
    assert 20 < num_right < num_drafted - 20


def test_500_requests_leak_nothing():
    engine = ToyEngine(make_limits(max_num_seqs=8, max_num_batched_tokens=24), num_blocks=30, depth=1)
    run_random(engine, 500, seed=0)


@pytest.mark.slow
def test_10000_requests_leak_nothing():
    engine = ToyEngine(make_limits(max_num_seqs=8, max_num_batched_tokens=24), num_blocks=30, depth=1)
    run_random(engine, 10_000, seed=1)
