"""Structured output: completions that follow a JSON schema, a regex, a list of choices or a grammar.

The problem: before each token the sampler must know which of V tokens keep the text inside the grammar, for every row
of its own, and a request without a grammar must not pay for one with. The idea: llguidance walks the grammar and the
tokens' bytes together and writes one bit per token; the host does that while the device runs the forward pass, whose
logits come last, and a small executable puts -inf where the bits are 0. Data flow:

    StructuredOutputsParams ─▶ grammar text ─▶ GrammarCompiler (threads, cache) ─▶ GrammarMatcher, one per sequence
                                                                                        │ fill
    committed tokens ──────────────────────────── accept ──────────────────────────────▶│
                                                                     int32[S, W] bits ◀─┘ MaskFiller

Deliberately not here: HTTP's spellings of a response format (`serving`), the device's part (`engine/runtime`), the
order of steps (`engine/core.py`).
"""
