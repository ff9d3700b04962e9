"""Bundles: a model compiled ahead, in one directory, that starts without tracing or compiling a step.

The problem: executables are the same at every start on the same machine, and most of a start goes into making them
again. The idea: `quire compile` writes what a start ends with (executables, weights as the device holds them, how many
KV blocks fit, tokenizer, settings) and what the model says to a fixed prompt; a start reads it, asks the prompt again,
and serves. An executable is as good as its key: versions, device, XLA's flags and Quire's own sources. A bundle with
another key is refused, with what differs and the command that makes it anew.

    <bundle>/bundle.json        `Manifest`: key, settings, sizes, probe, a digest of every other file
    <bundle>/executables/N.bin  one executable each, zlib
    <bundle>/weights.bin        arrays at multiples of 64 bytes, mapped into memory
    <bundle>/trees.bin          how they make up the parameters
    <bundle>/tokenizer/         tokenizer files

Trust: executables are machine code, and JAX keeps them as pickles. Whoever can write a bundle can run code in the
process that loads it. So a bundle is loaded only from files that are the user's own and that nobody else can write,
unless `trust_bundle` says otherwise. Digests find damage, not malice: who can write the files can write the digests.
"""
