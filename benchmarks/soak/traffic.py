"""The requests of a soak, and how each may end."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

WORDS = [
    "river",
    "stone",
    "lantern",
    "engine",
    "copper",
    "meadow",
    "signal",
    "harbor",
    "winter",
    "copper",
    "archive",
    "violet",
    "engine",
    "mirror",
    "thunder",
    "garden",
    "planet",
    "feather",
    "marble",
    "orbit",
    "canvas",
    "silver",
    "timber",
    "whisper",
    "compass",
    "island",
    "velvet",
    "ember",
    "quartz",
    "ladder",
]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LOST_S = 240.0  # a request that has not ended after this is lost


@dataclass(frozen=True)
class Job:
    """One request to send.

    Attributes:
        kind: for the table.
        path, body: of the POST. A body of bytes is sent as it is.
        expected: the HTTP status that it must get, unless the server is too busy (503).
        leave_after: leave after so many chunks of the answer; 0 = before the first; None = stay.
    """

    kind: str
    path: str
    body: dict[str, Any] | bytes
    expected: int = 200
    leave_after: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        result: "result", "error" (expected, and with the error's body), "busy" (503), "left" (we aborted it), "wrong"
            (another status or body than it must have) or "lost" (no end came).
        detail: what was wrong.
    """

    kind: str
    result: str
    detail: str = ""


def _prompt(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def _sampling(rng: random.Random) -> dict[str, Any]:
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 20, "seed": rng.randrange(1000)},
        {"temperature": 0.7, "min_p": 0.05, "presence_penalty": 0.5},
        {"temperature": 1.0, "frequency_penalty": 0.3, "logit_bias": {"17": -5}},
        {"temperature": 0.9, "stop": [" the", "\n\n"]},
        {"temperature": 1.0, "n": 3},
    ]
    return rng.choice(options)


def _completion(rng: random.Random, model: str) -> Job:
    body = {"model": model, "prompt": _prompt(rng, rng.randint(1, 120)), "max_tokens": rng.randint(1, 96)}
    body |= _sampling(rng) | {"stream": rng.random() < 0.6}
    if rng.random() < 0.2:
        body["logprobs"] = rng.randint(0, 5)
    return Job("completion", "/v1/completions", body)


def _chat(rng: random.Random, model: str) -> Job:
    messages = [{"role": "system", "content": "Answer in one sentence."}] if rng.random() < 0.5 else []
    messages.append({"role": "user", "content": _prompt(rng, rng.randint(2, 60))})
    body = {"model": model, "messages": messages, "max_tokens": rng.randint(1, 96), "stream": rng.random() < 0.7}
    return Job("chat", "/v1/chat/completions", body | _sampling(rng))


def _structured(rng: random.Random, model: str) -> Job:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"A person called {_prompt(rng, 1)}, as JSON."}],
        "max_tokens": 128,
        "temperature": 0.7,
        "response_format": schema,
        "stream": rng.random() < 0.5,
    }
    return Job("structured", "/v1/chat/completions", body)


def _long(rng: random.Random, model: str) -> Job:
    shared = _prompt(random.Random(rng.randrange(3)), 300)  # three prefixes that requests share
    body = {"model": model, "prompt": f"{shared} {_prompt(rng, rng.randint(1, 100))}", "max_tokens": 16}
    return Job("shared prefix", "/v1/completions", body | {"stream": rng.random() < 0.5, "temperature": 0.0})


def _embedding(rng: random.Random, model: str) -> Job:
    texts = [_prompt(rng, rng.randint(1, 60)) for _ in range(rng.randint(1, 3))]
    return Job("embedding", "/v1/embeddings", {"model": model, "input": texts})


def _leaver(rng: random.Random, model: str) -> Job:
    make = rng.choice((_completion, _chat, _structured, _long))
    job = make(rng, model)
    assert isinstance(job.body, dict)
    body = job.body | {"stream": True} | ({} if job.kind == "structured" else {"max_tokens": 200})
    return Job("left midway", job.path, body, leave_after=rng.choice((0, 0, 1, 2, 5, 20)))


def _bad(rng: random.Random, model: str) -> Job:
    path = "/v1/completions"
    bodies: list[tuple[dict[str, Any] | bytes, int]] = [
        ({"model": model, "prompt": "x", "temperature": 9}, 400),
        ({"model": model, "prompt": "x", "max_tokens": 0}, 400),
        ({"model": model, "prompt": _prompt(rng, 4000)}, 400),
        ({"model": "no-such-model", "prompt": "x"}, 404),
        ({"model": model, "prompt": [10**9]}, 400),
        ({"model": model, "prompt": "x", "structured_outputs": {"regex": "("}}, 400),
        (b'{"model": ', 400),
        (b"\xff\xfe", 400),
    ]
    body, expected = rng.choice(bodies)
    return Job("bad", path, body, expected=expected)


MIX: tuple[tuple[Callable[[random.Random, str], Job], float], ...] = (
    (_completion, 0.26),
    (_chat, 0.24),
    (_structured, 0.1),
    (_long, 0.1),
    (_embedding, 0.05),
    (_leaver, 0.17),
    (_bad, 0.08),
)


def next_job(rng: random.Random, model: str) -> Job:
    """Any job of the mix."""
    make = rng.choices([make for make, _ in MIX], [weight for _, weight in MIX])[0]
    return make(rng, model)


async def run_job(session: aiohttp.ClientSession, base_url: str, job: Job) -> Outcome:
    """Send a job and see how it ends."""
    try:
        async with asyncio.timeout(LOST_S):
            return await _run(session, base_url, job)
    except TimeoutError:
        return Outcome(job.kind, "lost", f"no end after {LOST_S:.0f} s: {str(job.body)[:300]}")
    except aiohttp.ClientError as error:
        return Outcome(job.kind, "lost", f"{type(error).__name__}: {error}")


async def _run(session: aiohttp.ClientSession, base_url: str, job: Job) -> Outcome:
    body = job.body if isinstance(job.body, bytes) else json.dumps(job.body).encode()
    headers = {"Content-Type": "application/json"}
    if job.leave_after == 0:
        post = asyncio.ensure_future(session.post(base_url + job.path, data=body, headers=headers))
        await asyncio.sleep(0.05)
        post.cancel()
        return Outcome(job.kind, "left")
    async with session.post(base_url + job.path, data=body, headers=headers) as response:
        if response.status == 503:
            return Outcome(job.kind, "busy")
        if response.status != job.expected:
            return Outcome(job.kind, "wrong", f"status {response.status}: {(await response.text())[:300]}")
        if response.status != 200:
            error = (await response.json()).get("error", {})
            complete = {"message", "type", "param", "code"} <= set(error)
            return Outcome(job.kind, "error") if complete else Outcome(job.kind, "wrong", f"body {error}")
        if response.content_type == "text/event-stream":
            return await _follow(job, _events(response))
        return _judge_whole(job, await response.json())


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    async for line in response.content:
        if line.startswith(b"data: "):
            yield line[6:].decode().strip()


async def _follow(job: Job, events: AsyncIterator[str]) -> Outcome:
    assert isinstance(job.body, dict)
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    chunks = 0
    async for data in events:
        if data == "[DONE]":
            break
        chunk = json.loads(data)
        if "error" in chunk:
            return Outcome(job.kind, "wrong", f"error in the stream: {chunk['error']}")
        for choice in chunk["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
            if choice.get("finish_reason"):
                reasons[choice["index"]] = choice["finish_reason"]
        chunks += 1
        if job.leave_after is not None and chunks >= job.leave_after:
            return Outcome(job.kind, "left")
    else:
        return Outcome(job.kind, "lost", f"the stream ended after {chunks} chunks without [DONE]")
    if len(reasons) != job.body.get("n", 1):
        return Outcome(job.kind, "lost", f"finish reasons {reasons} of {job.body.get('n', 1)} completions")
    return _judge_texts(job, texts, reasons)


def _judge_whole(job: Job, answer: dict[str, Any]) -> Outcome:
    if job.kind == "embedding":
        assert isinstance(job.body, dict)
        complete = len(answer["data"]) == len(job.body["input"]) and all(item["embedding"] for item in answer["data"])
        return Outcome(job.kind, "result") if complete else Outcome(job.kind, "wrong", str(answer)[:300])
    choices = answer["choices"]
    texts = {c["index"]: c["text"] if "text" in c else c["message"]["content"] or "" for c in choices}
    return _judge_texts(job, texts, {c["index"]: c["finish_reason"] for c in choices})


def _judge_texts(job: Job, texts: dict[int, str], reasons: dict[int, str]) -> Outcome:
    if not set(reasons.values()) <= {"stop", "length"}:
        return Outcome(job.kind, "wrong", f"finish reasons {reasons}")
    if job.kind == "structured" and reasons[0] == "stop":
        try:
            person = json.loads(texts[0])
        except json.JSONDecodeError:
            return Outcome(job.kind, "wrong", f"not JSON: {texts[0][:300]!r}")
        if set(person) != {"name", "age"}:
            return Outcome(job.kind, "wrong", f"not of the schema: {person}")
    return Outcome(job.kind, "result")
