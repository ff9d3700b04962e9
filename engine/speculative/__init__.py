"""Speculative decoding: guess tokens to come, verify all guesses in one step, and never change the answer.

    settings.py     `speculative_config`, vLLM's keys
    proposer.py     `Proposer`: what makes guesses
    history.py      tokens of a sequence, and where its last ones stood before
    ngram.py        from earlier occurrences of the last tokens in prompt and output
    corpus.py       outputs of sequences that have ended, and where a run of tokens stands in them
    suffix.py       what followed most often, in the sequence and in outputs of the past
    acceptance.py   how often the guesses of a sequence are right
    times.py        how long steps take with and without drafts
    protocol.py     what the loop asks of whoever decides
    device.py       whether drafts that the device makes itself pay (engine/runtime/drafting/)
    speculator.py   which sequences get drafts in the next step, if any

Drafts are known-but-unverified tokens of the one scheduling loop (`engine/scheduling/drafts.py`); the device samples
after each and keeps as many as were right (`engine/runtime/sampling/verify.py`). No jax here.
"""
