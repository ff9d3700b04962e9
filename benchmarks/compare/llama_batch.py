"""llama.cpp's library through llama-cpp-python's bindings: a context, and batches of tokens of several sequences.

Needs numpy and the bindings only where a context is made; what to put into each batch (`Schedule`) is plain Python.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    """One token of a batch: at a position of a sequence; `wants_logits` if the next token is to be chosen there."""

    token: int
    position: int
    sequence: int
    wants_logits: bool


@dataclass
class _Running:
    """A request in a slot. `computed`: tokens of it that are in the cache."""

    index: int
    slot: int
    computed: int


class Schedule:
    """Continuous batching: which tokens to compute next, for requests that are there all at once.

    A request takes the first free slot. Each batch has the newest token of every request that generates, then as much
    of the waiting prompts, oldest first, as fits. A slot is free again as soon as its request is complete.

    Args:
        prompts, output_lens: of the requests.
        num_slots: requests that run at once.
        batch_size: most tokens of a batch; at least `num_slots`.
        shared_len: leading tokens of every prompt that are in the cache of each slot when a request starts there.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        output_lens: Sequence[int],
        num_slots: int,
        batch_size: int,
        shared_len: int = 0,
    ) -> None:
        if batch_size < num_slots:
            raise ValueError(f"a batch of {batch_size} tokens cannot hold one of each of {num_slots} slots.")
        self.outputs: list[list[int]] = [[] for _ in prompts]
        self._prompts, self._output_lens = prompts, output_lens
        self._waiting = deque(range(len(prompts)))
        self._free = deque(range(num_slots))
        self._running: list[_Running] = []
        self._batch_size, self._shared_len = batch_size, shared_len

    def admit(self) -> list[int]:
        """Give free slots to waiting requests; returns these slots."""
        taken = []
        while self._waiting and self._free:
            running = _Running(self._waiting.popleft(), self._free.popleft(), self._shared_len)
            self._running.append(running)
            taken.append(running.slot)
        return taken

    def batch(self) -> list[Row]:
        """The next batch; empty once all is done. Between two calls there is one of `commit`."""
        rows = [
            Row(self.outputs[r.index][-1], r.computed, r.slot, True) for r in self._running if self.outputs[r.index]
        ]
        for running in self._running:
            prompt = self._prompts[running.index]
            stop = min(len(prompt), running.computed + self._batch_size - len(rows))
            rows += [Row(prompt[at], at, running.slot, at == len(prompt) - 1) for at in range(running.computed, stop)]
        return rows

    def commit(self, rows: Sequence[Row], chosen: dict[int, int]) -> list[int]:
        """Note that a batch was computed.

        Args:
            rows: the batch.
            chosen: sequence -> the token chosen at its row that wants logits.

        Returns: the slots that are free now; what they have in the cache is to be removed.
        """
        computed = {row.sequence: row.position + 1 for row in rows}
        freed = []
        for running in list(self._running):
            running.computed = computed.get(running.slot, running.computed)
            if running.slot not in chosen:
                continue
            self.outputs[running.index].append(chosen[running.slot])
            if len(self.outputs[running.index]) == self._output_lens[running.index]:
                self._running.remove(running)
                self._free.append(running.slot)
                freed.append(running.slot)
        return freed


class Context:
    """A context of the library, with a cache of its own for each sequence.

    Args:
        llama: the module `llama_cpp`.
        model: as `llama_model_load_from_file` gave it.
        num_sequences: most sequences at once.
        tokens_per_sequence: most tokens of each.
        num_threads: of all computations.
        cache_type: of keys and values, a constant of `llama`; None = the library's default.
    """

    BATCH = 2048  # the library's default: most tokens of one call

    def __init__(
        self,
        llama: Any,
        model: Any,
        num_sequences: int,
        tokens_per_sequence: int,
        num_threads: int,
        cache_type: int | None = None,
    ) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = num_sequences * tokens_per_sequence
        params.n_batch = self.BATCH
        params.n_seq_max = num_sequences
        params.n_threads = params.n_threads_batch = num_threads
        params.kv_unified = False
        if cache_type is not None:
            params.type_k = params.type_v = cache_type
        self._llama, self._context = llama, llama.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context for {num_sequences} x {tokens_per_sequence} tokens")
        self._memory = llama.llama_get_memory(self._context)
        self._num_tokens = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._make_batch()

    def _make_batch(self) -> None:
        """A batch whose fields are numpy arrays, so that a whole batch is filled in at once."""
        self._fields = {name: np.zeros(self.BATCH, np.int32) for name in ("token", "pos", "seq")}
        self._wants = np.zeros(self.BATCH, np.int8)
        self._ones = np.ones(self.BATCH, np.int32)
        seq = self._fields["seq"]
        self._pointers = seq.ctypes.data + seq.itemsize * np.arange(self.BATCH, dtype=np.uintp)
        llama = self._llama

        def pointer(array: Any, kind: Any) -> Any:
            return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

        self._batch = llama.llama_batch(
            n_tokens=0,
            token=pointer(self._fields["token"], llama.llama_token),
            pos=pointer(self._fields["pos"], llama.llama_pos),
            n_seq_id=pointer(self._ones, ctypes.c_int32),
            seq_id=pointer(self._pointers, ctypes.POINTER(llama.llama_seq_id)),
            logits=pointer(self._wants, ctypes.c_int8),
        )

    def clear(self) -> None:
        """Forget all sequences."""
        self._llama.llama_memory_clear(self._memory, False)

    def forget(self, sequence: int) -> None:
        """Forget one sequence."""
        self._llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def copy(self, source: int, target: int) -> None:
        """Give a sequence the cache of another one, all of it."""
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def compute(self, rows: Sequence[Row]) -> dict[int, int]:
        """Compute a batch; sequence -> the likeliest next token, where it is wanted.

        Raises:
            RuntimeError: the library refuses.
        """
        count = len(rows)
        for name, values in (
            ("token", [row.token for row in rows]),
            ("pos", [row.position for row in rows]),
            ("seq", [row.sequence for row in rows]),
        ):
            self._fields[name][:count] = values
        self._wants[:count] = [row.wants_logits for row in rows]
        self._batch.n_tokens = count
        code = self._llama.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode of {count} tokens returned {code}")
        return {row.sequence: self._likeliest(at) for at, row in enumerate(rows) if row.wants_logits}

    def _likeliest(self, at: int) -> int:
        logits = self._llama.llama_get_logits_ith(self._context, at)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._num_tokens,))))

    def close(self) -> None:
        """Free it."""
        self._llama.llama_free(self._context)
