"""Clients that mean no good: nothing they do may stop the server, leak a request, or grow its memory."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
import tracemalloc
from contextlib import suppress

import pytest

from tests.serving.fakes import FakeEngine, Script, async_test, until
from tests.serving.test_operations import BODY, Listening, http_post, listening, raw

GARBAGE = [
    b"\x00" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the begin of TLS
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(5000)) + b"\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
]


async def still_serves(live: Listening) -> None:
    """A request is answered, and no other is live."""
    answer = await raw(live.port, http_post({"prompt": "x", "max_tokens": 4}))
    assert answer.startswith(b"HTTP/1.1 200 ")
    await until(lambda: not live.engine.live and live.traffic.num_live == 0)


@pytest.mark.parametrize("data", GARBAGE)
@async_test
async def test_what_is_not_http(data: bytes) -> None:
    async with listening(receive_timeout=0.5) as live:
        with suppress(ConnectionError):
            answer = await raw(live.port, data)
            status = int(answer.split()[1])
            assert 400 <= status < 500, answer[:100]
            json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        await still_serves(live)


@async_test
async def test_a_huge_n_is_bounded_by_the_engines_limits() -> None:
    async with listening() as live:
        answer = await raw(live.port, http_post({"prompt": "x", "n": 10**9}))
        assert b" 400 " in answer[:20]
        await still_serves(live)


@async_test
async def test_pipelined_requests_are_answered_in_order() -> None:
    async with listening() as live:
        parts = [http_post({"prompt": "x", "request_id": str(i), "max_tokens": 1}, more="") for i in range(20)]
        answer = await raw(live.port, b"".join(parts) + http_post({"prompt": "x", "request_id": "last"}))
        assert answer.count(b"HTTP/1.1 200 OK") == 21
        places = [answer.index(f'"cmpl-{i}"'.encode()) for i in [*range(20), "last"]]
        assert places == sorted(places)


@async_test
async def test_half_closed_sockets_get_their_answer_or_are_aborted() -> None:
    async with listening() as live:
        for _ in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
            writer.write(http_post({**BODY, "stream": True}))
            writer.write_eof()
            with suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(5):
                    await reader.read()
            writer.close()
        await still_serves(live)


@pytest.mark.slow
@async_test
async def test_many_slow_clients_do_not_hold_up_others() -> None:
    async with listening(receive_timeout=3.0) as live:
        # The file descriptors of both ends are this process's: no more than 400.
        begun = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-"
        slow = [asyncio.create_task(raw(live.port, begun, wait=15.0)) for _ in range(400)]
        await asyncio.sleep(0.5)
        for _ in range(5):
            await still_serves(live)
        assert not any(task.done() for task in slow), "they were slow all the while"
        for answer in await asyncio.gather(*slow):
            assert b" 408 " in answer[:20]
        await still_serves(live)


@pytest.mark.slow
@async_test
async def test_a_thousand_aborted_streams_leave_nothing() -> None:
    engine, order = FakeEngine(Script(delay_s=0.001)), random.Random(0)

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
        writer.write(http_post({**BODY, "stream": order.random() < 0.8, "n": order.choice([1, 2])}))
        await asyncio.sleep(order.random() * 0.05)
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(0.01):
                await reader.read(order.randrange(1, 2000))
        writer.transport.abort()

    async with listening(engine) as live:
        for _ in range(2):  # what the first streams make once (caches, buffers) is no leak
            await asyncio.gather(*[one() for _ in range(40)])
        await until(lambda: not engine.live)
        engine.seen.clear()
        engine.aborted.clear()
        gc.collect()
        tracemalloc.start(8)
        before = tracemalloc.take_snapshot()
        for _ in range(25):
            await asyncio.gather(*[one() for _ in range(40)])
        await until(lambda: not engine.live and live.traffic.num_live == 0)
        assert len(engine.seen) > 500 and len(engine.aborted) > 500
        engine.seen.clear()
        engine.aborted.clear()
        await asyncio.sleep(0.1)
        gc.collect()
        after = tracemalloc.take_snapshot()
        tracemalloc.stop()
        grown = sum(change.size_diff for change in after.compare_to(before, "filename"))
        assert grown < 500_000, f"{grown} bytes are left of 1000 streams"
        await still_serves(live)


@pytest.mark.slow
@async_test
async def test_large_bodies_that_never_end_are_not_kept() -> None:
    async with listening(receive_timeout=2.0, max_request_bytes=100_000) as live:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        async def one() -> None:
            with suppress(ConnectionError):
                _, writer = await asyncio.open_connection("127.0.0.1", live.port)
                writer.write(head)
                for _ in range(200):
                    writer.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
                    await writer.drain()
                writer.close()

        await asyncio.gather(*[one() for _ in range(16)])
        await still_serves(live)
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown_kib < 60_000, f"{grown_kib} KiB more at the peak"
