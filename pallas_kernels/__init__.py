"""Operations of an LLM's step, each with a slow reference, an XLA implementation and, where it pays, a Pallas kernel.

The problem: the few operations in which an inference engine differs from a training step (attention over paged keys and
values, writes into pages, matrix products against packed weights) deserve one specification and several
implementations. The idea: one folder per operation; `reference.py` says what is right in plain float32, `xla.py` runs
everywhere, a kernel is one more file; `cases.py` names the workloads that tests, benchmarks and the tuner share. An
`Op` climbs its ladder once per shape and logs what it chose.

Deliberately not here: models, requests, sampling, anything that reads the environment. The only files are its own:
tables of tuned configurations. The package could be published as it stands.
"""
