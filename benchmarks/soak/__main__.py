"""`python -m benchmarks.soak`: run a soak, write its report, and exit with 1 if it found a fault."""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import aiohttp

from benchmarks.server_process import ServerProcess, descendants, rss_mib, server_process
from benchmarks.soak.report import Soak, markdown, write
from benchmarks.soak.traffic import Outcome, next_job, run_job
from benchmarks.soak.watch import Sample, read_metrics
from serving.bench.machine import machine

SETTLE_S = 20.0
ENGINE_FLAGS = ("--max-model-len", "1024", "--max-num-seqs", "16", "--max-num-batched-tokens", "256")


def main(argv: Sequence[str] | None = None) -> int:
    """Run it.

    Returns:
        0 if nothing was lost or leaked.
    """
    args = _parser().parse_args(argv)
    soak = asyncio.run(_soak(args))
    write(soak, args.out)
    print(markdown(soak))
    return 1 if soak.faults() else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--concurrency", type=int, default=24, help="clients, each with one request at a time")
    parser.add_argument("--sample-s", type=float, default=5.0, help="seconds between two looks at the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local/soak"))
    parser.add_argument("engine_flags", nargs="*", default=list(ENGINE_FLAGS), help="after --: flags of the engine")
    return parser


async def _soak(args: argparse.Namespace) -> Soak:
    with server_process(args.model, args.engine_flags, args.out / "server.log") as server:
        # Every client leaves connections behind at random, so none is kept for the next request.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            outcomes, samples = await _load(args, session, server)
            after = await _settled(session, server)
        exit_code = server.stop()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    facts = {
        "date": date.today().isoformat(),
        "model": args.model,
        "concurrency": args.concurrency,
        "commit": commit or "unknown",
        "machine": machine(),
        "engine_flags": args.engine_flags,
        "command": shlex.join(["python", "-m", "benchmarks.soak", *sys.argv[1:]]),
    }
    return Soak(outcomes, samples, after, exit_code, facts)


async def _load(
    args: argparse.Namespace, session: aiohttp.ClientSession, server: ServerProcess
) -> tuple[list[Outcome], list[Sample]]:
    started = time.monotonic()
    end = started + 60 * args.minutes
    async with session.get(f"{server.base_url}/v1/models") as response:
        model = (await response.json())["data"][0]["id"]
    outcomes: list[Outcome] = []

    async def client(number: int) -> None:
        rng = random.Random(f"{args.seed}/{number}")
        while time.monotonic() < end:
            outcomes.append(await run_job(session, server.base_url, next_job(rng, model)))

    samples: list[Sample] = []
    clients = asyncio.gather(*(client(number) for number in range(args.concurrency)))
    while time.monotonic() < end:
        await asyncio.sleep(args.sample_s)
        samples.append(await _sample(session, server, started))
        print(f"\r{samples[-1].time_s:6.0f} s, {len(outcomes)} requests, {samples[-1].rss_mib:.0f} MiB", end="")
    print()
    await clients
    return outcomes, samples


async def _sample(session: aiohttp.ClientSession, server: ServerProcess, started: float) -> Sample:
    values = await read_metrics(session, server.base_url)
    return Sample(time.monotonic() - started, rss_mib(descendants(server.process.pid)), values)


async def _settled(session: aiohttp.ClientSession, server: ServerProcess) -> Sample:
    """The server once nothing runs any more, or after `SETTLE_S`."""
    started = time.monotonic()
    while True:
        sample = await _sample(session, server, started)
        idle = sample.values["running"] == sample.values["waiting"] == 0
        if idle or sample.time_s > SETTLE_S:
            return sample
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
