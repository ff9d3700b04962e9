"""The outermost layer: what a person or a program talks to.

The engine takes prompts and gives `RequestOutput`s; this package puts a command line around it. Flags are made from
the engine's own dataclasses, so a new setting needs no line here; a user's fault becomes one line on stderr and an exit
code. Nothing here computes: no jax, no arrays, no scheduling.

- `cli.py`: the commands, their parser, errors and exit codes.
- `flags.py`: dataclass fields → flags → settings.
- `backend.py`: what the commands need of an engine, and the one place that loads it.
- `commands/`: `generate`, `chat`, `convert`. `bench/`: `bench latency`, `bench throughput`.
"""
