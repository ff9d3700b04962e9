"""The engine in a process of its own: `RemoteEngine` here, `python -m engine.remote.worker` there.

The problem: the engine's loop holds Python's interpreter lock for a good part of each step, and so does a server that
parses, tokenizes and writes to hundreds of sockets; in one process each waits for the other. The idea: two processes
and one socket pair between them. What is asked goes over as plain values, what comes back is one small message per step
with what is new of every request. The server's side imports no jax, and outlives a crash of the engine's.

        serving ─▶ RemoteEngine ── Add, Abort, Ask, Stop ─▶ worker: reader thread ─▶ inbox ─▶ Driver ─▶ EngineCore
                        ▲                                                                       │
                        └─────────────── Step (all deltas of one step), Answer, Failed ◀────────┘

Files: `wire` (messages, and how they are cut out of a stream of bytes), `plain` (requests as plain values), `deltas`
(outputs as what is new of them), `process` (start, talk to and end a worker), `supervisor` (start it again),
`exchange` (who waits for what), `client` (`RemoteEngine`), `worker`.
Deliberately not here: what happens between two steps (`engine.driver`) and what waits for a consumer (`engine.stream`).
"""
