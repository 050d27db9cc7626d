"""The page in a real browser; its server runs in this process, and tests hold its answers back."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
import threading
import types
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from typing import Any

import pytest
import uvicorn
from browser import Browser, chromium
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient

from steerlm2.serving.page import FILES, add_page

Json = dict[str, Any]

WIDE, PHONE = (1280, 800), (390, 844)
ATTRIBUTES = [
    {"name": "humor", "min": 0, "max": 4, "default": 0},
    {"name": "verbosity", "min": 1, "max": 3, "default": 2},
]
SYSTEM = "Answer."
SEND = ("button", "Send")
QUESTION = ("textbox", "Your question")
DONE = "document.querySelectorAll('.answer .actions').length == {} && !stop.offsetParent"
TEXTS = "[...document.querySelectorAll('.answer .text')].map((each) => each.textContent)"


class Fake:
    """A server whose model answers a question with itself, as often as the verbosity says."""

    def __init__(self) -> None:
        self.requests: list[Json] = []
        self.held = threading.Event()
        """Set: answers go on after their first word."""
        self.held.set()
        self.closed = threading.Event()
        """Set: a client has left in the middle of an answer."""
        self.key: str | None = None
        self.app = FastAPI()
        add_page(self.app)
        self.app.add_api_route("/v1/models", self.models)
        self.app.add_api_route("/v1/chat/completions", self.answer, methods=["POST"])

    def refusal(self, request: Request) -> JSONResponse | None:
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return _error(401, "send the header Authorization: Bearer KEY")

    async def models(self, request: Request) -> Any:
        own = {"id": "mine", "max_model_len": 256, "attributes": ATTRIBUTES}
        return self.refusal(request) or {"data": [own | {"system": SYSTEM, "scores": True}]}

    async def answer(self, request: Request) -> Any:
        if refusal := self.refusal(request):
            return refusal
        body = await request.json()
        self.requests.append(body)
        question = body["messages"][-1]["content"]
        if question == "refuse":
            return _error(400, "more than 256 tokens")
        return StreamingResponse(self.stream(body, question), media_type="text/event-stream")

    async def stream(self, body: Json, question: str) -> AsyncIterator[str]:
        values = body["attributes"]
        yield _event({"attributes": values, "choices": []})
        yield _event({"choices": [{"index": 0, "delta": {"content": question}}]})
        try:
            while not self.held.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.closed.set()
            raise
        if question == "break":
            yield _event({"error": {"message": "the engine failed"}})
            return
        rest = f" {question}" * (values["verbosity"] - 1)
        for index in range(body.get("best_of", 1)):
            end = {"finish_reason": "stop", "scores": {"humor": 1.0 + index, "verbosity": 1.5}}
            text = rest if index == 0 else f"Candidate {index}."
            yield _event({"choices": [{"index": index, "delta": {"content": text}} | end]})
        yield "data: [DONE]\n\n"


def _event(content: Json) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"type": "invalid_request_error", "message": message}}, status)


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Fake, str]]:
    fake = Fake()
    server = uvicorn.Server(uvicorn.Config(fake.app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield fake, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = server.force_exit = True
    thread.join()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(chromium(), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def fake(running: tuple[Fake, str]) -> Iterator[Fake]:
    fake, _ = running
    yield fake
    fake.requests.clear()
    fake.held.set()
    fake.key = None


@pytest.fixture
def page(fake: Fake, running: tuple[Fake, str], started: Browser) -> Iterator[Browser]:
    """The page, just opened in a wide window, which nothing is kept in from earlier tests."""
    started.resize(*WIDE)
    started.open(running[1])
    started.evaluate("localStorage.clear(), sessionStorage.clear()")
    started.wait("!send.disabled")
    started.complaints.clear()
    yield started
    assert started.complaints == []


def ask(page: Browser, question: str, answers: int = 1) -> None:
    """Type a question, send it by Enter, and wait for so many answers in all."""
    page.click(*QUESTION)
    page.write(question)
    page.press("Enter")
    page.wait(DONE.format(answers))


def test_the_package_has_the_page_and_it_needs_nothing_else() -> None:
    """No address in its files but that of a picture's language, and the browser is told so."""
    app = FastAPI()
    add_page(app)
    client = TestClient(app)
    for path, (name, content_type) in FILES.items():
        answer = client.get(path)
        text = resources.files("steerlm2.serving.page").joinpath(name).read_text(encoding="utf-8")
        assert (answer.text, answer.headers["content-type"]) == (text, content_type)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert set(re.findall(r"\w+://[\w.]+", text)) <= {"http://www.w3.org"}


def test_a_moved_slider_steers_the_answer_which_streams_and_is_scored(
    page: Browser, fake: Fake
) -> None:
    page.click("slider", "verbosity", at=0.98)
    fake.held.clear()
    page.click(*QUESTION)
    page.write("Hello you")
    page.click(*SEND)
    assert page.wait(f"{TEXTS}.join('')") == "Hello you"
    assert page.evaluate("document.querySelectorAll('.bars').length") == 0
    fake.held.set()
    page.wait(DONE.format(1))
    assert page.evaluate(TEXTS) == ["Hello you Hello you Hello you"]
    assert page.evaluate("[...document.querySelectorAll('.bars li')].map((e) => e.innerText)") == [
        "humor\n1.0 asked 0",
        "verbosity\n1.5 asked 3",
    ]
    widths = "[...document.querySelectorAll('.fill')].map((e) => e.style.width)"
    assert page.evaluate(widths) == ["25%", "25%"]  # 1 from 0 to 4, 1.5 from 1 to 3
    assert page.evaluate("spoken.textContent") == "Hello you Hello you Hello you"
    (body,) = fake.requests
    assert body == {
        "model": "mine",
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "Hello you"},
        ],
        "attributes": {"humor": 0, "verbosity": 3},
        **{"temperature": 0.7, "top_p": 0.9, "max_tokens": 128, "scores": True, "stream": True},
    }


def test_two_settings_answer_side_by_side_and_go_on_from_their_own_answers(
    page: Browser, fake: Fake
) -> None:
    ask(page, "One.")
    page.click("button", "Compare")
    page.click("slider", "verbosity", which=1, count=2, at=0.02)
    ask(page, "Two.", answers=3)
    assert page.evaluate(TEXTS) == ["One. One.", "Two. Two.", "Two."]
    boxes = page.evaluate(
        "[...document.querySelectorAll('.turn:last-child .answer')]"
        ".map((each) => each.getBoundingClientRect().toJSON())"
    )
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["right"] < boxes[1]["left"]
    ask(page, "Three.", answers=5)
    messages = {body["attributes"]["verbosity"]: body["messages"] for body in fake.requests[-2:]}
    first = {"role": "assistant", "content": "One. One."}
    first["attributes"] = {"humor": 0, "verbosity": 2}
    for verbosity, text in ((2, "Two. Two."), (1, "Two.")):
        assert messages[verbosity][1:] == [
            {"role": "user", "content": "One."},
            first,
            {"role": "user", "content": "Two."},
            {"role": "assistant", "content": text, "attributes": first["attributes"]}
            | {"attributes": {"humor": 0, "verbosity": verbosity}},
            {"role": "user", "content": "Three."},
        ]


def test_everything_by_keyboard(page: Browser, fake: Fake) -> None:
    """On a narrow page, where no field has the focus at first; what has it is always outlined."""
    page.resize(*PHONE)
    page.call("Page.reload")
    page.wait("window.send && !send.disabled")
    seen, focused = [], "document.activeElement"
    outlined = f"[{focused}, {focused}.closest('.ask')].some("
    outlined += "(each) => each && getComputedStyle(each).outlineStyle != 'none')"

    def tab(times: int = 1) -> None:
        for _ in range(times):
            page.press("Tab")
            seen.append(page.evaluate(f"{focused}.innerText || {focused}.id"))
            assert page.evaluate(outlined), seen[-1]

    tab(4)
    page.press("Enter")  # opens the attributes
    tab(5)
    page.press("ArrowRight", times=2)
    tab()
    page.press("End")
    tab()
    assert [text.split("\n")[0] for text in seen] == [
        *("Skip to the question", "Compare", "New chat", "Attributes"),
        *("Usual", "High", "Low", "Save…", "slider-0-0", "slider-0-1", "Request"),
    ]
    while page.evaluate("document.activeElement.id") != "question":
        tab()
    page.write("Hello")
    page.press("Enter", shift=True)
    page.write("you")
    fake.held.clear()
    page.press("Enter")
    page.wait(f"{TEXTS}.join('') == 'Hello\\nyou'")
    page.press("Escape")
    page.wait(DONE.format(1))
    assert fake.closed.wait(10)
    assert "Stopped." in page.evaluate("document.querySelector('.answer').innerText")
    assert fake.requests[0]["attributes"] == {"humor": 2, "verbosity": 3}
    fake.held.set()
    page.press("ArrowUp")  # takes the last question back
    page.write("!")
    page.press("Enter")
    page.wait(DONE.format(1))
    assert fake.requests[1]["messages"][1:] == [{"role": "user", "content": "Hello\nyou!"}]


SIDEWAYS = """[...document.querySelectorAll("*")]
  .filter((each) => each.scrollWidth > each.clientWidth + 1)
  .filter((each) => ["auto", "scroll"].includes(getComputedStyle(each).overflowX))
  .map((each) => each.id || each.className)"""


def test_no_width_scrolls_sideways(page: Browser) -> None:
    """Not even with words that don't fit, all panels open, and two answers."""
    page.click("button", "Compare")
    ask(page, "Longword" * 40, answers=2)
    for width, height in (WIDE, (1000, 700), PHONE, (320, 640)):
        page.resize(width, height, phone=width < 500)
        for panel in range(3):
            page.evaluate(f"document.querySelectorAll('.panel')[{panel}].open = true")
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate(SIDEWAYS) == []


def test_markup_in_questions_and_answers_stays_text(page: Browser, fake: Fake) -> None:
    """While the answer streams, and when it is done."""
    text = "<img src=x onerror=\"document.title = 'owned'\"><script>document.title = 1</script>&lt;"
    fake.held.clear()
    page.click(*QUESTION)
    page.write(text)
    page.press("Enter")
    for whole in (text, f"{text} {text}"):
        page.wait(f"{TEXTS}.join('') == {json.dumps(whole)}")
        assert page.evaluate("document.querySelectorAll('img, body script').length") == 0
        fake.held.set()
    page.wait(DONE.format(1))
    assert page.evaluate("document.title") == "mine · steerlm2"


def test_errors_are_shown_where_the_answer_would_be_and_can_be_tried_again(
    page: Browser, fake: Fake
) -> None:
    """A refusal, an end in the middle, no server; failed questions are no part of what follows."""
    problem = "[...document.querySelectorAll('.problem')].at(-1).innerText"
    ask(page, "refuse", 1)
    assert page.evaluate(problem) == "more than 256 tokens"
    ask(page, "break", 2)
    assert page.evaluate(problem) == "the engine failed"
    assert page.evaluate(f"{TEXTS}[1]") == "break"
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.call("Network.enable")
    page.call("Network.emulateNetworkConditions", offline=True, **offline)
    ask(page, "Hello", 3)
    assert page.evaluate(problem) == "The server can't be reached."
    page.call("Network.emulateNetworkConditions", offline=False, **offline)
    page.click("button", "Try again")
    page.wait(f"{TEXTS}[2] == 'Hello Hello'")
    assert [each["content"] for each in fake.requests[-1]["messages"]] == [
        *(SYSTEM, "break", "break", "Hello")
    ]
    page.complaints[:] = [each for each in page.complaints if "Failed to load" not in each]


def test_a_server_with_a_key_is_asked_with_it(page: Browser, fake: Fake) -> None:
    """Another key is asked for again; the tab keeps it, and no snippet has it."""
    fake.key = "right"
    page.call("Page.reload")
    for key in ("wrong", "right"):
        page.click("textbox", "API key")
        page.write(key)
        page.press("Enter")
        page.wait("!document.querySelector('dialog').open || key.value == ''")
    page.wait("!send.disabled")
    page.call("Page.reload")
    page.wait("window.send && !send.disabled")
    ask(page, "Hello")
    assert page.evaluate("JSON.stringify(localStorage)") == "{}"
    for tool in ("curl", "Python"):
        snippet = copied(page, f"Copy as {tool}")
        assert "STEERLM2_API_KEY" in snippet
        assert "right" not in snippet
    page.complaints[:] = [each for each in page.complaints if "401" not in each]


def copied(page: Browser, name: str) -> str:
    """What a button puts onto the clipboard."""
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    page.call("Browser.grantPermissions", permissions=permissions)
    page.evaluate("navigator.clipboard.writeText('')")
    page.click("button", name)
    page.wait("navigator.clipboard.readText()")
    return page.evaluate("navigator.clipboard.readText()")


def test_the_snippets_send_the_request(
    page: Browser, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell's words, and a Python program; both with quotes, emoji and line breaks."""
    page.click("spinbutton", "Seed")
    page.write("7")
    ask(page, "It's \"5\" \\n $HOME `ls` 🙂 '''")
    sent = {key: value for key, value in fake.requests[0].items() if key != "stream"}
    words = shlex.split(copied(page, "Copy as curl"))
    assert json.loads(words[words.index("-d") + 1]) == sent
    assert words[1].endswith("/v1/chat/completions")

    calls: list[Json] = []
    message = types.SimpleNamespace(content="", scores={})
    answer = types.SimpleNamespace(choices=[types.SimpleNamespace(message=message, scores={})])
    create = lambda **arguments: calls.append(arguments) or answer  # noqa: E731
    completions = types.SimpleNamespace(create=create)
    openai = types.ModuleType("openai")
    openai.OpenAI = lambda base_url, api_key: types.SimpleNamespace(  # type: ignore[attr-defined]
        chat=types.SimpleNamespace(completions=completions)
    )
    monkeypatch.setitem(sys.modules, "openai", openai)
    exec(copied(page, "Copy as Python"), {})
    (arguments,) = calls
    assert arguments.pop("extra_body") | arguments == sent


def test_presets_are_kept_and_can_be_deleted(page: Browser) -> None:
    values = "Object.fromEntries([...document.querySelectorAll('.lane-0 .attribute')]"
    values += ".map((each) => each.innerText.split('\\n')))"
    for name, expected in (
        ("High", {"humor": "4", "verbosity": "3"}),
        ("Low", {"humor": "0", "verbosity": "1"}),
        ("Usual", {"humor": "0", "verbosity": "2"}),
    ):
        page.click("button", name)
        assert page.evaluate(values) == expected
    page.click("slider", "humor", at=0.5)
    page.click("button", "Save…")
    page.write("<b>dry</b>")
    page.press("Enter")
    page.call("Page.reload")
    page.click("button", "<b>dry</b>")
    assert page.evaluate(values) == {"humor": "2", "verbosity": "2"}
    page.click("button", "Delete preset <b>dry</b>")
    page.find("button", "<b>dry</b>", count=0)


def test_candidates_of_best_of_can_be_looked_at_and_chosen(page: Browser, fake: Fake) -> None:
    page.click("spinbutton", "Best of")
    page.press("ArrowUp", times=2)
    ask(page, "Hello")
    assert page.evaluate(TEXTS) == ["Hello Hello"]
    page.click("button", "Next candidate")
    assert page.evaluate(TEXTS) == ["Candidate 1."]
    assert "2.0 asked 0" in page.evaluate("document.querySelector('.bars').innerText")
    ask(page, "Well?", 2)
    assert fake.requests[0]["best_of"] == 3
    assert fake.requests[1]["messages"][2]["content"] == "Candidate 1."


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_that_reading_needs(page: Browser, scheme: str) -> None:
    """4.5 between every text and what it stands on (WCAG 2.2, 1.4.3), with all that can show."""
    page.prefer(scheme)
    page.click("button", "Compare")
    ask(page, "refuse", 2)
    page.complaints.clear()
    ask(page, "Hello", 4)
    found = page.evaluate(CONTRASTS)
    assert len(found) > 30
    assert {text: ratio for text, ratio in found if ratio < 4.5} == {}


CONTRASTS = """(() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color, under) => {
    context.fillStyle = `rgb(${under})`;
    context.fillRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const ground = (each) =>
    each ? rgb(getComputedStyle(each).backgroundColor, ground(each.parentElement)) : [0, 0, 0];
  const light = (color) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = color.map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  return [...document.body.querySelectorAll("*")]
    .filter((each) => each.checkVisibility({ visibilityProperty: true }) && each.offsetWidth > 1)
    .filter((each) => [...each.childNodes].some((node) => node.nodeType == 3 && node.data.trim()))
    .map((each) => {
      const under = ground(each);
      const pair = [light(rgb(getComputedStyle(each).color, under)), light(under)];
      return [each.textContent.trim().slice(0, 40), Math.max(...pair) / Math.min(...pair)];
    });
})()"""
