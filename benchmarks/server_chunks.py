"""What one streamed chunk costs the server's process, engine apart: `python -m benchmarks.server_chunks`.

A scripted engine gives every stream one token at a time, each with a turn of the event loop, as a real one does. The
readers are another process, so that the CPU seconds are the server's alone: JSON, chunked encoding, socket, and the
engine's stand-in (its outputs are made anew each time: part of what is measured).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvloop

from engine.client import EngineClient, EngineInfo
from engine.input_processor import Prompt
from engine.outputs import CompletionOutput, RequestOutput
from engine.sampling_params import SamplingParams
from engine.text.tokenizer import Tokenizer
from serving.endpoints import ALL_ROUTES
from serving.http.app import make_app
from serving.http.context import make_context
from serving.http.server import HttpServer
from serving.http.settings import ServerSettings

TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "tiny" / "llama"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [1, 2, 3], "stream": True},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "stream": True},
}


@dataclass
class InstantEngine:
    """Gives `num_tokens` tokens at once to whoever asks."""

    num_tokens: int
    tokenizer: Tokenizer

    @property
    def info(self) -> EngineInfo:
        """As `EngineClient`."""
        return EngineInfo("instant", 320, 8, 4096, 256, 20, (2,), 100, 16, False, SamplingParams())

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """As `EngineClient`."""
        for number in range(self.num_tokens):
            await asyncio.sleep(0)
            end = "length" if number == self.num_tokens - 1 else None
            piece = CompletionOutput(0, " token", (5,), finish_reason=end)
            yield RequestOutput(request_id, None, (1, 2, 3), [piece], end is not None)


def serve(loop: str, num_tokens: int) -> None:
    """The server's process: says its URL, then its CPU seconds for each line on stdin."""

    async def run() -> None:
        engine = cast(EngineClient, InstantEngine(num_tokens, Tokenizer.from_directory(TOKENIZER)))
        server = HttpServer(make_app(make_context(engine, ServerSettings(port=0, access_log=False)), ALL_ROUTES))
        print(await server.start(), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(time.process_time(), flush=True)
        await server.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop) as runner:
        runner.run(run())


async def read_streams(port: int, path: str, count: int) -> None:
    """Read `count` streams at once to their end."""
    data = json.dumps(BODIES[path]).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        last = b""
        while piece := await reader.read(1 << 20):
            last = (last + piece)[-64:]
        assert b"[DONE]" in last, last
        writer.close()

    await asyncio.gather(*[one() for _ in range(count)])


def main() -> None:
    """Measure each loop and endpoint a few times and print microseconds per chunk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", metavar="LOOP", help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.tokens)
    for loop in ("asyncio", "uvloop"):
        command = [sys.executable, "-m", "benchmarks.server_chunks", "--serve", loop, "--tokens", str(args.tokens)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            port = int(process.stdout.readline().rsplit(":", 1)[1])

            def cpu_s(process: subprocess.Popen[str] = process) -> float:
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                return float(process.stdout.readline())

            for path in BODIES:
                figures = []
                for _ in range(args.repeats):
                    before = cpu_s()
                    asyncio.run(read_streams(port, path, args.streams))
                    figures.append((cpu_s() - before) / args.streams / args.tokens * 1e6)
                print(f"{loop:8} {path:22} us per chunk: " + ", ".join(f"{figure:.1f}" for figure in figures))
            process.stdin.close()


if __name__ == "__main__":
    main()
