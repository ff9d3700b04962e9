"""All that is to be measured on a GPU, in one command, for a machine that is at hand for an hour and then gone.

    gpu_session ── session ──▶ worker of part 1 ── JSON lines ──▶ <part>.jsonl ── report ──▶ report.md
                           ──▶ worker of part 2 …

The problem: a kernel that deadlocks hangs its process for good, a fault of the device makes every later call in that
process fail, and time is short. The idea: the session itself never touches a device. Each part runs in a process of its
own that says when it begins a case and what came out; a case that takes too long is killed with its process group,
recorded, and the rest goes on in a new process. Every line is written as it comes, so a killed session keeps what it
had, and `--resume` goes on behind the last finished case.

    part.py       `Part` and `Case`: what a part is
    parts/        the parts themselves
    session.py    runs parts; process.py: one worker under a deadline; worker.py: the worker's side
    records.py    the result files
    report.py     Markdown from the result files
    timing.py, roofline.py, models.py, steps.py, kernels.py: what the parts share

Results hold raw times, bytes and operations; percentages are made when the report is, with the ceilings that the part
`environment` measured in the same session.
"""
