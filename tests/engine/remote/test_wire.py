"""Messages survive the wire whatever the pieces they come in, and so do requests, outputs and errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from engine import errors
from engine.client import EngineInfo
from engine.errors import ContextLengthError, InvalidRequestError, QuireError, RequestFailedError
from engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from engine.remote import wire
from engine.remote.deltas import DeltaWriter, LiveRequest
from engine.remote.plain import from_plain, to_plain
from engine.remote.wire import Add, Answer, Frames, MessageTooLongError, Step, error_from_wire, error_to_wire, frame
from engine.requests.request import Request
from engine.sampling_params import RequestOutputKind, SamplingParams
from engine.stream import OutputStream

ROOT = Path(__file__).resolve().parents[3]
PARAMS = [
    SamplingParams(),
    SamplingParams(max_tokens=None, temperature=0, seed=-(2**63), stop="\n", logprobs=0, detokenize=True),
    SamplingParams(
        n=3,
        seed=2**63 - 1,
        stop=["a", "b"],
        stop_token_ids=[1, 2],
        logit_bias={5: 1.5, 7: -100.0},
        allowed_token_ids=[3, 4],
        bad_words=["x"],
        top_p=0.5,
        top_k=40,
        min_p=0.1,
        presence_penalty=1.0,
        output_kind=RequestOutputKind.FINAL_ONLY,
        prompt_logprobs=2,
        ignore_eos=True,
    ),
]


def request_of(params: SamplingParams) -> Request:
    return Request("r", "text", (1, 2, 3), params, (2,), ((5,), (6, 7)), -5, 3, "salt", 12.5)


@given(st.lists(st.binary(max_size=50), max_size=12), st.data())
def test_frames_in_any_pieces(values: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frame(Answer(number, value)) for number, value in enumerate(values))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    frames, found = Frames(), []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += [wire.from_worker_decoder.decode(message) for message in frames.feed(stream[start:stop])]
    assert [(m.number, m.value) for m in found if isinstance(m, Answer)] == list(enumerate(values))


def test_messages_that_are_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    data = frame(Answer(0, "x" * 200))
    monkeypatch.setattr(wire, "MOST_MESSAGE_BYTES", 100)
    with pytest.raises(MessageTooLongError, match="20[0-9] bytes; a message may have 100"):
        frame(Answer(0, "x" * 200))
    with pytest.raises(MessageTooLongError):
        list(Frames().feed(bytes(data)))


@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
def test_requests(params: SamplingParams) -> None:
    request = request_of(params)
    message = wire.to_worker_decoder.decode(memoryview(frame(Add(7, to_plain(request))))[4:])
    assert isinstance(message, Add) and message.handle == 7
    again = from_plain(Request, message.request)
    assert again == request and hash(again.prompt_token_ids) == hash(request.prompt_token_ids)
    for name in SamplingParams.field_names():
        assert type(getattr(again.params, name)) is type(getattr(params, name)), name


def test_defaults_stay_at_home() -> None:
    assert set(to_plain(SamplingParams(top_k=5))) <= {"top_k", "stop", "stop_token_ids", "bad_words"}


def test_infos() -> None:
    info = EngineInfo("m", 320, 64, 128, 4, 20, (2, 3), 255, 16, True, PARAMS[2], {"start_s": {"load": 1.5}})
    assert from_plain(EngineInfo, wire.msgspec.msgpack.decode(wire.msgspec.msgpack.encode(to_plain(info)))) == info


@pytest.mark.parametrize("name", sorted(errors.__all__))
def test_errors_keep_type_and_message(name: str) -> None:
    kind = getattr(errors, name)
    error = InvalidRequestError("says", "prompt", "code") if kind is InvalidRequestError else kind("says")
    again = error_from_wire(error_to_wire(error))
    assert type(again) is kind and str(again) == str(error) == "says"
    if isinstance(error, InvalidRequestError):
        assert isinstance(again, InvalidRequestError)
        assert (again.parameter, again.code) == (error.parameter, error.code)
    assert isinstance(again, QuireError)


def test_other_errors_are_named() -> None:
    again = error_from_wire(error_to_wire(ZeroDivisionError("by zero")))
    assert type(again) is RequestFailedError and str(again) == "ZeroDivisionError: by zero"


def outputs_of_a_request(n: int, logprobs: bool) -> list[RequestOutput]:
    """Three steps of n completions; the last one ends them."""
    first = RequestOutput("r", "text", (1, 2, 3), [], False, num_cached_tokens=2)
    outputs = []
    for step in range(3):
        completions = [
            CompletionOutput(
                j,
                f"{step}{j}",
                (step * 10 + j,),
                -0.5 if logprobs else None,
                [{step: Logprob(-0.5, 1, "x"), 9: Logprob(float("-inf"), None, None)}] if logprobs else None,
                "stop" if step == 2 else None,
                (7 if j == 0 else "word") if step == 2 else None,
            )
            for j in range(n)
        ]
        scores = [None, {2: Logprob(-1.0, 3, "b")}] if logprobs else None
        outputs.append(structs.replace(first, outputs=completions, prompt_logprobs=scores, finished=step == 2))
    outputs[-1] = structs.replace(
        outputs[-1], metrics=RequestMetrics(1.0, 1.0, 2.0, 3.0, None, 3, 1, 2, 6, 3, (2, 1, 0))
    )
    return outputs


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("logprobs", [False, True])
def test_outputs_arrive_as_they_were(n: int, logprobs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, outputs = DeltaWriter(), outputs_of_a_request(n, logprobs)
    seen: list[RequestOutput] = []
    stream = OutputStream(cumulative=False)
    monkeypatch.setattr(stream, "put", seen.append)
    live = LiveRequest(request_of(PARAMS[0]), stream)
    writer.open("r", 3)
    short = 0
    for output in outputs:
        data = frame(writer.write([("r", output)]))
        assert b"text" not in data, "the prompt never goes back"
        step = wire.from_worker_decoder.decode(memoryview(data)[4:])
        assert isinstance(step, Step)
        for handle, tokens, text in step.tokens:
            assert handle == 3
            live.put_tokens(tokens, text)
            short += 1
        for item in step.outputs:
            live.put(item)
    assert seen == outputs
    assert all(type(s.metrics) is type(o.metrics) for s, o in zip(seen, outputs, strict=True))
    assert isinstance(seen[-1].metrics, RequestMetrics) and type(seen[-1].metrics.num_preemptions) is int
    assert short == (1 if n == 1 and not logprobs else 0)
    assert writer.drop(3) is None, "nothing is kept of requests that ended"


def test_a_refused_request_is_forgotten() -> None:
    writer = DeltaWriter()
    writer.open("r", 3)
    step = writer.write([("r", ContextLengthError("too long"))])
    assert [(handle, type(error_from_wire(e))) for handle, e in step.refused] == [(3, ContextLengthError)]
    assert writer.drop(3) is None


def test_a_dropped_request_is_silent_until_its_end() -> None:
    writer, outputs = DeltaWriter(), outputs_of_a_request(1, False)
    writer.open("r", 3)
    assert writer.write([("r", outputs[0])]).outputs
    assert writer.drop(3) == "r"
    for output in outputs[1:]:
        step = writer.write([("r", output)])
        assert not step.outputs and not step.tokens
    assert writer.drop(3) is None


def test_this_side_imports_no_jax() -> None:
    code = (
        "import sys, engine.remote.client; "
        "bad = [m for m in sys.modules if m.partition('.')[0] in ('jax', 'jaxlib', 'flax')]; assert not bad, bad[:5]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
