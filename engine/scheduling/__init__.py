"""Who runs in the next step, with which tokens, in which KV blocks: pure Python, no arrays, no jax.

The problem: many sequences of unequal length share one device and one fixed pool of KV blocks, and the device must
never wait for the host. The idea: there are no phases. Each step gives every sequence some tokens, out of one budget,
so that *computed* catches up with *known*; chunked prefill, prefix caching, and recomputation after preemption are
cases of that one loop.

    add ──▶ waiting ──admit──▶ running ──┐          plan()   → StepPlan, what the device computes next
               ▲                  │      ▼          commit() ← the tokens it sampled; may come some plans later
               └────preempt───────┘   finished

- `limits`: the numbers that one scheduler obeys. `policy`: the order. `stopping`: when a sequence ends.
- `block_pool` owns the ids of KV blocks; `prefix_hash` names their contents; `allocator` gives blocks to sequences.
- `groups`: the n sequences of one request, and the limits on the queue. `scheduler` puts it together; `invariants`
  proves it.

It deliberately knows nothing of buckets, arrays, text, stop strings (the engine calls `Scheduler.finish`) or clocks.
"""
