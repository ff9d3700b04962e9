"""A worker with no engine behind it: `python fake_worker.py`, steered by the settings it is loaded with.

Settings: `log`: a file that gets a line when a run begins and ends; `first_token`: of its outputs; `misbehave`: what to
do in runs of one output token: "short", "raise", "die", "hang" or "unordered".
"""

import os
import time
from pathlib import Path

from benchmarks.ceilings import Ceilings
from benchmarks.compare.protocol import Job, Loaded, Sample, serve


class FakeEngine:
    """See `protocol.EngineUnderTest`."""

    def load(self, settings: dict) -> Loaded:
        """Remember how to behave."""
        self.settings = settings
        print("an engine that writes to stdout must not disturb the replies")
        return Loaded({"fake": "1.0"}, {"pid": os.getpid()})

    def run(self, job: Job) -> Sample:
        """Answer with counting tokens, 1 ms each."""
        self._log(f"begin {os.getpid()}")
        outputs = [[self.settings["first_token"] + i for i in range(length)] for length in job.output_lens]
        times = [0.001 * (i + 1) for i in range(job.output_lens[0])] if job.stream else []
        if job.output_lens[0] == 1:
            match self.settings.get("misbehave"):
                case "short":
                    outputs[0] = []
                case "raise":
                    raise ValueError("this engine cannot do that")
                case "die":
                    os._exit(3)
                case "hang":
                    time.sleep(60)
                case "unordered":
                    times = times[::-1] + [0.0]
        time.sleep(0.01)
        self._log(f"end {os.getpid()}")
        return Sample(wall_s=1.0, outputs=outputs, token_times_s=times, num_cached_tokens=len(job.prompts) - 1)

    def ceilings(self) -> Ceilings:
        """Made up."""
        return Ceilings({"fake": float(self.settings["first_token"])}, {"fake bfloat16": 10.0})

    def _log(self, line: str) -> None:
        with Path(self.settings["log"]).open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    serve(FakeEngine())
