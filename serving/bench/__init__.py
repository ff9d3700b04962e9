"""`quire bench`: latency and throughput of the engine, and of any server (`serve*.py`), defined as in `vllm bench`.

A workload is a list of repetitions, each a list of (prompt ids, output length). Every repetition has the same lengths
and token ids of its own, so that no prefix cache carries work from one to the next. Decoding is greedy, end-of-sequence
tokens are ignored, and output lengths are asserted: a run that did other work is an error, not a figure. The first
repetitions are warm-up and excluded.

Offline, `workloads.py` makes repetitions, `measure.py` runs one, `report.py` describes the machine and writes results.
"""
