"""The chat page in a real Chromium, served by the real app with a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from aiohttp import web
from playwright.sync_api import Browser, Page, expect

from engine.client import StepEvent
from serving.endpoints import ALL_ROUTES
from serving.endpoints.page import ROUTES as PAGE_ROUTES
from serving.http.app import make_app
from serving.http.context import make_context
from serving.http.settings import ServerSettings
from tests.serving.browser import needs_chromium, page_of, running_browser
from tests.serving.fakes import FakeEngine, Script
from tests.serving.scripted_server import served

pytestmark = needs_chromium

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
XSS = '<img src=x onerror="document.title=1"><script>document.title=2</script> **<b>bold</b>** `<i>`'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as found:
        yield found


def app_of(engine: FakeEngine, **settings: object) -> web.Application:
    return make_app(make_context(engine, ServerSettings(**settings), chat_template=TEMPLATE), ALL_ROUTES)  # type: ignore[arg-type]


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def answer_of(page: Page):
    return page.locator(".turn.assistant").last


def test_an_answer_streams_with_its_speed(browser: Browser) -> None:
    engine = FakeEngine(Script(answer="one two three four five", delay_s=0.03))
    with served(app_of(engine)) as url, page_of(browser, url) as page:
        expect(page.locator("#model")).to_have_text("tiny")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("System prompt").fill("be brief")
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Most tokens").fill("200")
        ask(page, "hello\nyou")
        expect(page.locator(".turn.user .text")).to_have_text("hello\nyou")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        expect(answer_of(page).locator(".text")).to_have_text("one two three four five")
        expect(answer_of(page).locator(".stats")).to_contain_text("tokens/s · first after")
        expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")
        assert "≈" not in answer_of(page).locator(".stats").inner_text(), "counted by the server"
        _, prompt, params, _ = engine.seen[-1]
        assert params.temperature == 0.5 and params.max_tokens == 200
        assert engine.tokenizer is not None
        assert engine.tokenizer.decode(prompt["prompt_token_ids"]).strip() == "system: be brief\nuser: hello\nyou"
        ask(page, "again")
        expect(page.locator(".turn")).to_have_count(4)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        text = engine.tokenizer.decode(engine.seen[-1][1]["prompt_token_ids"])
        assert "assistant: one two three four five\nuser: again" in text, "the conversation is kept"
        page.get_by_role("button", name="New chat").click()
        expect(page.locator(".turn")).to_have_count(0)


def test_stop_ends_the_answer_and_the_request(browser: Browser) -> None:
    engine = FakeEngine(Script(answer="word " * 100, delay_s=0.02))
    with served(app_of(engine)) as url, page_of(browser, url) as page:
        ask(page, "go on")
        expect(answer_of(page).locator(".text")).to_contain_text("word word")
        page.get_by_role("button", name="Stop").click()
        expect(answer_of(page).locator(".stats")).to_contain_text("stopped")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        for _ in range(100):
            if engine.aborted:
                break
            page.wait_for_timeout(20)
        assert len(engine.aborted) == 1 and not engine.live


def test_the_keyboard_alone_is_enough(browser: Browser) -> None:
    engine = FakeEngine(Script(answer="word " * 100, delay_s=0.02))
    with served(app_of(engine)) as url, page_of(browser, url) as page:
        expect(page.get_by_label("Message")).to_be_focused()  # from the start
        page.keyboard.type("first")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("second")
        assert page.get_by_label("Message").input_value() == "first\nsecond"
        page.keyboard.press("Enter")
        expect(answer_of(page).locator(".text")).to_contain_text("word")
        page.keyboard.press("Escape")
        expect(answer_of(page).locator(".stats")).to_contain_text("stopped")
        expect(page.get_by_label("Message")).to_be_focused()
        reached = set()
        for _ in range(12):
            page.keyboard.press("Tab")
            focused = page.evaluate(
                "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
            )
            assert focused[0] in ("input", "") or focused[1] != "none", f"no focus ring: {focused}"
            reached.add(focused[0])
        assert {"toggle-settings", "clear", "toggle-theme", "timeline", "send"} <= reached


def test_dark_and_light(browser: Browser) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with served(app_of(FakeEngine())) as url:
        with page_of(browser, url, dark=True) as page:
            assert page.evaluate(background) == "rgb(19, 20, 22)", "follows the system"
        with page_of(browser, url) as page:
            assert page.evaluate(background) == "rgb(247, 246, 243)"
            page.get_by_role("button", name="Switch to dark colours").click()
            assert page.evaluate(background) == "rgb(19, 20, 22)"
            page.reload()
            assert page.evaluate(background) == "rgb(19, 20, 22)", "the choice is remembered"


def steps(count: int) -> list[StepEvent]:
    """A prompt every tenth step, else decoding."""
    made = []
    for index in range(count):
        prompt = 100 if index % 10 == 0 else 0
        made.append(StepEvent(index, 100 + index * 0.02, 0.02, prompt + 5, 5, prompt, 128 if prompt else 8))
    return made


COLORS_SEEN = """() => {
  const canvas = document.getElementById("timeline");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const counts = {};
  for (let i = 0; i < data.length; i += 4)
    if (data[i + 3] === 255) { const c = [data[i], data[i + 1], data[i + 2]].join(); counts[c] = (counts[c] ?? 0) + 1; }
  return counts;
}"""


def test_the_timeline_shows_steps(browser: Browser) -> None:
    engine = FakeEngine()
    with served(app_of(engine)) as url, page_of(browser, url) as page:
        expect(page.locator("#running")).to_have_text("0")
        blank = page.evaluate(COLORS_SEEN)
        decode, prompt, padding, time = "59,111,212", "217,131,36", "213,209,200", "123,135,148"
        assert not {decode, prompt, padding, time} & blank.keys()
        engine.steps += steps(50)
        expect(page.locator("#step")).to_have_text("step 49: 5 sequences, 20.0 ms. 5 new + 0 prompt + 3 padding")
        seen = page.evaluate(COLORS_SEEN)
        assert all(seen.get(color, 0) > 50 for color in (decode, prompt, padding, time)), seen
        page.locator("#timeline").focus()
        for _ in range(10):
            page.keyboard.press("ArrowLeft")
        expect(page.locator("#step")).to_contain_text("step 40: 5 sequences, 20.0 ms. 5 new + 100 prompt + 23 padding")
        page.keyboard.press("Tab")
        engine.steps[:] = steps(3)  # the engine was started anew
        expect(page.locator("#step")).to_contain_text("step 2: ")
        expect(page.locator("#fact-steps")).to_have_text("3")


def test_what_the_model_writes_is_text(browser: Browser) -> None:
    code = "```html\n<b>code</b> **no**\n```"
    answer = f"# Title\n{XSS}\n\n- a **b**\n- c\n\n3. x\n4. y\n\n{code}\ndone *it* [x](javascript:1)"
    with (
        served(app_of(FakeEngine(Script(answer=answer, tokens_per_output=(3,))))) as url,
        page_of(browser, url) as page,
    ):
        ask(page, XSS)
        text = answer_of(page).locator(".text")
        expect(text).to_contain_text("javascript:1")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        assert page.title() == "Quire"
        assert page.locator(".turn img, .turn script, .turn b, .turn i, .turn a").count() == 0
        assert page.locator(".turn.user .text").inner_text() == XSS
        assert '<img src=x onerror="document.title=1">' in text.inner_text()
        assert text.locator("strong").all_inner_texts() == ["<b>bold</b>", "b"]
        assert text.locator("code").all_inner_texts() == ["<i>", "<b>code</b> **no**"]
        assert text.locator("h3").inner_text() == "Title" and text.locator("em").inner_text() == "it"
        assert text.locator("ul li").all_inner_texts() == ["a b", "c"]
        assert text.locator("ol").get_attribute("start") == "3"


def test_a_server_that_is_away_is_said_and_tried_again(browser: Browser) -> None:
    engine = FakeEngine(Script(answer="here again"))
    engine.dead = "the engine stopped"
    with served(app_of(engine)) as url, page_of(browser, url) as page:
        expect(page.locator("#model")).to_have_text("tiny")
        ask(page, "hello?")
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("the engine stopped")
        page.context.set_offline(True)
        page.get_by_role("button", name="Try again").click()
        expect(alert).to_contain_text("The server cannot be reached.")
        expect(page.get_by_role("status")).to_have_text("server away")
        page.context.set_offline(False)
        engine.dead = None
        page.get_by_role("button", name="Try again").click()
        expect(answer_of(page).locator(".text")).to_have_text("here again")
        expect(alert).to_have_count(0)
        expect(page.locator(".turn")).to_have_count(2)
        expect(page.get_by_role("status")).to_have_text("ready")


def test_an_error_in_the_stream_is_said(browser: Browser) -> None:
    engine = FakeEngine(Script(answer="some words and more", error=RuntimeError("a step failed"), error_at=3))
    with served(app_of(engine)) as url, page_of(browser, url) as page:
        ask(page, "hi")
        expect(page.get_by_role("alert")).to_be_visible()
        expect(answer_of(page).locator(".stats")).to_contain_text("cut")


def test_a_key_is_asked_for_and_used(browser: Browser) -> None:
    with served(app_of(FakeEngine(Script(answer="let in")), api_key=["s3cret"])) as url, page_of(browser, url) as page:
        ask(page, "hi")
        expect(page.get_by_role("alert")).to_contain_text("API key")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("s3cret")
        page.get_by_role("button", name="Try again").click()
        expect(answer_of(page).locator(".text")).to_have_text("let in")
        assert "s3cret" not in page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")


def test_reasoning_is_folded(browser: Browser) -> None:
    async def chat(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for delta in ({"role": "assistant"}, {"reasoning": "hmm <b>"}, {"reasoning": " so"}, {"content": "42"}):
            value = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
            await response.write(f"data: {json.dumps(value)}\n\n".encode())
            await asyncio.sleep(0.05)
        end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
        await response.write(f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n".encode())
        return response

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "thinker"}]})

    app = web.Application()
    app.router.add_get("/", PAGE_ROUTES[0].handler)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", chat)
    with served(app) as url, page_of(browser, url) as page:
        ask(page, "why?")
        expect(answer_of(page).locator(".text")).to_have_text("42")
        fold = answer_of(page).locator("details")
        expect(fold.locator("summary")).to_contain_text("Reasoning, 0.")
        expect(fold.locator("div")).to_be_hidden()
        fold.locator("summary").click()
        expect(fold.locator("div")).to_have_text("hmm <b> so")
        expect(answer_of(page).locator(".stats")).to_contain_text("≈ 3 tokens")
        expect(answer_of(page).locator(".stats")).to_contain_text("cut: no tokens left")


def test_a_narrow_screen_shows_one_thing_at_a_time(browser: Browser) -> None:
    engine = FakeEngine(Script(answer="a" * 400 + "\n```\n" + "b" * 400 + "\n```"))
    engine.steps += steps(20)
    with served(app_of(engine)) as url, page_of(browser, url, width=380, height=700) as page:
        ask(page, "wide " + "w" * 300)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        fits = "document.documentElement.scrollWidth <= innerWidth"
        assert page.evaluate(fits) and not page.locator("#timeline").is_visible()
        page.get_by_role("button", name="Engine").click()
        expect(page.locator("#timeline")).to_be_visible()
        assert page.evaluate(fits) and not page.get_by_label("Message").is_visible()
        assert sum(page.evaluate(COLORS_SEEN).values()) > 100


def test_a_hidden_page_asks_nothing(browser: Browser) -> None:
    with served(app_of(FakeEngine())) as url, page_of(browser, url) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(1300)
        assert 2 <= len(asked) <= 4 and all("/engine/steps?since=" in url for url in asked)
        page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
        page.wait_for_timeout(600)
        asked.clear()
        page.wait_for_timeout(1200)
        assert asked == []
        page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
        page.wait_for_timeout(300)
        assert len(asked) >= 1
