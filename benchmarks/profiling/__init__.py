"""Reads what XLA on CPU leaves behind, without guessing from names.

trace.py        a profiler trace → which instruction ran when, on which thread
hlo.py          a compiled program's text → what each instruction is, and which Python function it comes from
categories.py   instruction → category, by the file, function and operation that it comes from
attribution.py  intervals → time per category that adds up to the wall time
traffic.py      real steps of a real engine, with a trace around some of them
"""
