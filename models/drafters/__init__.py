"""Heads that guess tokens from a decoder's hidden states: Medusa, EAGLE and EAGLE-3.

    config.py    what a head is, from its `config.json` and the decoder that it is for. No jax
    tensors.py   from which checkpoint tensors its parameters are made
    medusa.py    heads side by side: head i guesses the token i + 1 places on (Cai et al. 2024, arXiv 2401.10774)
    eagle.py     one small layer that goes on by itself from its own output (Li et al. 2024, arXiv 2401.15077; EAGLE-3:
                 Li et al. 2025, arXiv 2503.01840)
    load.py      files -> config and parameters on the device

A head is useless without its decoder ("target"): it reads the target's hidden states, and borrows the embedding table
and the output head that its checkpoint does not have. Which guesses are used, and when, is the engine's business.
"""
