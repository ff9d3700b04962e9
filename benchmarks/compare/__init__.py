"""Quire and its peers on the same workloads in one run, taking turns.

    driver ──JSON lines──▶ worker of Quire          (this environment)
           ──JSON lines──▶ worker of transformers   (an environment of its own, Python 3.11)
           …

Each engine runs in a process of its own, in an environment of its own. The driver starts every worker once, warms it
up, then asks one after the other for each repetition of each workload, so that whatever disturbs the machine hits all
alike. A worker that is not asked is stopped (SIGSTOP): it cannot spin, and only one engine computes at a time.

`peer.py` says what a peer is and `registry.py` lists them; a peer is one file, `worker_<name>.py`.
"""
