"""Record what an engine did, step by step, and do it again: `record=FILE`, `quire replay FILE`.

The problem: an answer was wrong, or a step failed, once, under load, and the requests that shared its steps are gone.
The idea: what a step computes depends on nothing but its plan, the tokens before it and the device's state, which
earlier steps made. So the plans, in the order in which they were handed to the device, are all that is needed to come
to the same point again, on this machine or on another, with these kernels or with others.

    EngineCore ─▶ RecordingExecutor ─▶ Executor          recorded: requests, plans, masks of grammars, sampled tokens
                        └─▶ FILE ─▶ replay ─▶ Executor   compared: tokens, and digests of everything else

Files: `events` (what a line of the file says), `recorder`, `player`, `report`. Deliberately not here: scheduling. A
replay does not decide again what a step holds, so neither times nor arrivals matter.
"""
