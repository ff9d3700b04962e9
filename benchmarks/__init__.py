"""Measurements of Quire, alone and beside other engines. README.md says how to run each and how to read it.

    workloads/        what is run: token ids made from fixed seeds, checked by hash
    compare/          Quire and its peers on the same workloads in one run, taking turns
    roofline.py       what the machine allows: bytes and operations of a workload, ceilings of the machine
    ceilings.py       measures those ceilings
    gpu_session.py    all that is to be measured on a GPU, in one command; gpu/ has its parts
    profile_step.py   where the time of one engine step goes
    profiling/        reads XLA's traces for it

Nothing in the packages imports this. `compare/` also runs under other engines' Python versions: what their workers
import (`protocol`, `peer`, `ceilings`, the worker itself) keeps to Python 3.11, the standard library and numpy.
"""
