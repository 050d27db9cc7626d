"""The page in a real browser; its server runs in this process, and tests hold its answers back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from browser import Browser, chromium
from fastapi import FastAPI
from fastapi.testclient import TestClient

from steerlm2.attributes import AttributeSchema
from steerlm2.data.packing import RewardGroup
from steerlm2.data.records import STOP
from steerlm2.data.templates import extra_id_template, response_end
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.inference.attribute_model import AttributeModel
from steerlm2.inference.steered import SteeredModel
from steerlm2.inference.streaming import GenerationSettings, Piece
from steerlm2.serving.steering_server import PAGE, PAGE_FILES, create_app
from steerlm2.serving.steering_service import SteeringLimits

Json = dict[str, Any]

WIDE, PHONE = (1280, 800), (390, 844)
SCHEMA = AttributeSchema(("humor", "verbosity", "wit"), ((0, 4), (1, 3), (0, 2)))
USUAL = "humor:0,verbosity:2"  # no wit: it isn't asked for unless somebody moves its slider
TOKENIZER, TEMPLATE = tiny_tokenizer(), extra_id_template()
UNSET = "\N{EN DASH}"
SEND = ("button", "Send")
QUESTION = ("textbox", "Your question")
DONE = "document.querySelectorAll('.answer .actions').length == {} && !stop.offsetParent"
TEXTS = "[...document.querySelectorAll('.answer .text')].map((each) => each.textContent)"


class Scores(AttributeModel):
    """Finds as much humor in a text as its digits say, and verbosity and wit always alike."""

    def score(self, groups: Sequence[RewardGroup]) -> list[list[list[float]]]:
        return [[self._of(group.prompt + own) for own in group.responses] for group in groups]

    def _of(self, ids: list[int]) -> list[float]:
        answer = self.tokenizer.decode(ids).rpartition("Assistant\n")[2]
        return [1.0 + sum(map(int, re.findall(r"(?<!_)\d", answer))), 1.5, 2.0]


class Echo:
    """An engine that answers a question with itself, as often as the verbosity says.

    Its answer to "break" breaks off. Further answers of a request are "Candidate 1." and so on.
    """

    max_seq_len = 512

    def __init__(self) -> None:
        self.asked: list[tuple[str, GenerationSettings]] = []
        """Every prompt."""
        self.goes_on = threading.Event()
        """Answers stop in the middle until it is set."""
        self.left = threading.Event()
        """A caller has gone away in the middle of an answer."""

    async def generate(
        self, prompt: Sequence[int], settings: GenerationSettings
    ) -> AsyncIterator[Piece]:
        text = TOKENIZER.decode(prompt)
        self.asked.append((text, settings))
        question = text.rpartition("User\n")[2].partition("\n<extra_id_1>Assistant")[0]
        yield Piece(0, TOKENIZER.encode(question), None, None)
        try:
            while not self.goes_on.is_set():
                await asyncio.sleep(0.01)
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise
        if question == "break":
            raise ConnectionError("the engine failed")
        end_of_turn, stop_id = response_end(TEMPLATE, TOKENIZER)
        rest = f" {question}" * (int(text.rpartition("verbosity:")[2][0]) - 1)
        for i in range(settings.n):
            own = f"Candidate {i}." if i else rest
            yield Piece(i, [*TOKENIZER.encode(own + end_of_turn), stop_id], None, STOP)

    async def close(self) -> None:
        pass


def app_of(
    engine: Echo, api_key: str | None = None, limits: SteeringLimits | None = None
) -> FastAPI:
    cpu = World(torch.device("cpu"))
    scores = Scores(torch.nn.Identity(), TOKENIZER, TEMPLATE, SCHEMA, cpu, 512, 1024)
    model = SteeredModel(TEMPLATE, TOKENIZER, SCHEMA, USUAL, "Answer.", engine, scores)
    return create_app(model, "mine", limits=limits, api_key=api_key)


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The address of a server in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = server.force_exit = True
    thread.join()


ENGINE = Echo()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(app_of(ENGINE)) as address:
        yield address


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(chromium(), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def engine() -> Echo:
    ENGINE.asked.clear()
    ENGINE.goes_on.set()
    ENGINE.left.clear()
    return ENGINE


@pytest.fixture
def page(engine: Echo, address: str, started: Browser) -> Iterator[Browser]:
    """The page, just opened in a wide window, which nothing is kept in from earlier tests."""
    started.resize(*WIDE)
    started.open(address)
    started.evaluate("localStorage.clear()")
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


def shown(*turns: str) -> str:
    """The prompt of a conversation: the answers' labels, where they have one, and the texts."""
    text = "<extra_id_0>System\nAnswer.\n"
    for turn in turns:
        text += f"<extra_id_1>{turn}\n"
    return text


def asks(text: str) -> str:
    return f"User\n{text}"


def says(label: str, text: str = "") -> str:
    return f"Assistant\n<extra_id_2>{label}\n{text}".removesuffix("\n")


def test_the_package_has_the_page_and_it_needs_nothing_else() -> None:
    """No address in its files but that of a picture's language, and the browser is told so."""
    with TestClient(app_of(Echo(), api_key="secret")) as client:
        for path, (name, content_type) in PAGE_FILES.items():
            answer = client.get(path)
            text = (PAGE / name).read_text(encoding="utf-8")
            assert (answer.text, answer.headers["content-type"]) == (text, content_type)
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert set(re.findall(r"\w+://[\w.]+", text)) <= {"http://www.w3.org"}


def test_a_moved_slider_steers_the_answer_which_streams_and_is_scored(
    page: Browser, engine: Echo
) -> None:
    page.click("slider", "verbosity", at=0.98)
    engine.goes_on.clear()
    page.click(*QUESTION)
    page.write("Hello you")
    page.click(*SEND)
    assert page.wait(f"{TEXTS}.join('')") == "Hello you"
    assert page.evaluate("document.querySelectorAll('.bars').length") == 0
    engine.goes_on.set()
    page.wait(DONE.format(1))
    assert page.evaluate(TEXTS) == ["Hello you Hello you Hello you"]
    assert page.evaluate("[...document.querySelectorAll('.bars li')].map((e) => e.innerText)") == [
        "humor\n1.0 asked 0",
        "verbosity\n1.5 asked 3",
        "wit\n2.0",
    ]
    widths = "[...document.querySelectorAll('.fill')].map((e) => e.style.width)"
    assert page.evaluate(widths) == ["25%", "25%", "100%"]  # of 0 to 4, 1 to 3, and 0 to 2
    assert page.evaluate("spoken.textContent") == "Hello you Hello you Hello you"
    ((prompt, settings),) = engine.asked
    assert prompt == shown(asks("Hello you"), says("humor:0,verbosity:3"))
    assert (settings.temperature, settings.top_p, settings.n) == (0.7, 0.9, 1)


def test_two_settings_answer_side_by_side_and_go_on_from_their_own_answers(
    page: Browser, engine: Echo
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
    first = [asks("One."), says("humor:0,verbosity:2", "One. One."), asks("Two.")]
    assert {prompt for prompt, _ in engine.asked[-2:]} == {
        shown(*first, says(label, text), asks("Three."), says(label))
        for label, text in (("humor:0,verbosity:2", "Two. Two."), ("humor:0,verbosity:1", "Two."))
    }


def test_everything_by_keyboard(page: Browser, engine: Echo) -> None:
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
    page.press("Home")  # sets what wasn't set
    tab()
    assert [text.split("\n")[0] for text in seen] == [
        *("Skip to the question", "Compare", "New chat", "Attributes"),
        *("Usual", "High", "Low", "Save…", "slider-0-0", "slider-0-1", "slider-0-2", "Request"),
    ]
    while page.evaluate(f"{focused}.id") != "question":
        tab()
    page.write("Hello")
    page.press("Enter", shift=True)
    page.write("you")
    engine.goes_on.clear()
    page.press("Enter")
    page.wait(f"{TEXTS}.join('') == 'Hello\\nyou'")
    page.press("Escape")
    page.wait(DONE.format(1))
    assert engine.left.wait(10)
    assert "Stopped." in page.evaluate("document.querySelector('.answer').innerText")
    engine.goes_on.set()
    page.press("ArrowUp")  # takes the last question back
    page.write("!")
    page.press("Enter")
    page.wait(DONE.format(1))
    assert [prompt for prompt, _ in engine.asked] == [
        shown(asks(text), says("humor:2,verbosity:3,wit:0"))
        for text in ("Hello\nyou", "Hello\nyou!")
    ]


SIDEWAYS = """(() => {
  const scrolls = (each) =>
    each.scrollWidth > each.clientWidth + 1 &&
    ["auto", "scroll"].includes(getComputedStyle(each).overflowX);
  const leaves = (each) => {
    const { left, right, width } = each.getBoundingClientRect();
    return width > 1 && (left < -1 || right > innerWidth + 1);
  };
  return [...document.body.querySelectorAll("*")]
    .filter((each) => scrolls(each) || leaves(each))
    .map((each) => each.id || each.className || each.localName);
})()"""


def test_no_width_scrolls_sideways(page: Browser) -> None:
    """Not even with words that don't fit, all panels open, and two answers."""
    page.click("button", "Compare")
    ask(page, "Longword" * 25, answers=2)
    for width, height in (WIDE, (1000, 700), PHONE, (320, 640)):
        page.resize(width, height, phone=width < 500)
        for panel in range(3):
            page.evaluate(f"document.querySelectorAll('.panel')[{panel}].open = true")
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate(SIDEWAYS) == []


def test_markup_in_questions_and_answers_stays_text(page: Browser, engine: Echo) -> None:
    """While the answer streams, and when it is done."""
    text = "<img src=x onerror=\"document.title = 'owned'\"><script>document.title = 1</script>&lt;"
    engine.goes_on.clear()
    page.click(*QUESTION)
    page.write(text)
    page.press("Enter")
    for whole in (text, f"{text} {text}"):
        page.wait(f"{TEXTS}.join('') == {json.dumps(whole)}")
        assert page.evaluate("document.querySelectorAll('img, body script').length") == 0
        engine.goes_on.set()
    page.wait(DONE.format(1))
    assert page.evaluate("document.title") == "mine · steerlm2"


def test_errors_are_shown_where_the_answer_would_be_and_can_be_tried_again(
    page: Browser, engine: Echo
) -> None:
    """A refusal, an end in the middle, no server; refused questions are no part of what follows."""
    problem = "[...document.querySelectorAll('.problem')].at(-1).innerText"
    ask(page, "long " * 600, 1)
    assert "tokens are more than the model's 512" in page.evaluate(problem)
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
    label = "humor:0,verbosity:2"
    follows = shown(asks("break"), says(label, "break"), asks("Hello"), says(label))
    assert engine.asked[-1][0] == follows
    page.complaints[:] = [each for each in page.complaints if "Failed to load" not in each]


def test_a_server_with_a_key_is_asked_with_it(page: Browser, engine: Echo) -> None:
    """Another key is asked for again; the tab keeps the right one, and no snippet has it."""
    with serving(app_of(engine, api_key="right")) as address:
        page.open(address)
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
    page: Browser, engine: Echo, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words of a shell, and a program; with quotes, line breaks and an emoji."""
    page.click("spinbutton", "Seed")
    page.write("7")
    ask(page, "It's \"5\" \\n $HOME `ls` 🙂 '''")
    words = shlex.split(copied(page, "Copy as curl"))
    headers = dict([words[words.index("-H") + 1].split(": ")])
    httpx.post(words[1], content=words[words.index("-d") + 1], headers=headers).raise_for_status()
    exec(copied(page, "Copy as Python"), {})
    assert "'humor': " in capsys.readouterr().out  # the scores
    assert engine.asked[0][1].seed == 7
    assert engine.asked == engine.asked[:1] * 3


def test_presets_are_kept_and_can_be_deleted(page: Browser) -> None:
    values = "Object.fromEntries([...document.querySelectorAll('.lane-0 .attribute')]"
    values += ".map((each) => each.innerText.split('\\n')))"
    for name, expected in (
        ("High", {"humor": "4", "verbosity": "3", "wit": "2"}),
        ("Low", {"humor": "0", "verbosity": "1", "wit": "0"}),
        ("Usual", {"humor": "0", "verbosity": "2", "wit": UNSET}),
    ):
        page.click("button", name)
        assert page.evaluate(values) == expected
    page.click("slider", "humor", at=0.5)
    page.click("button", "Save…")
    page.write("<b>dry</b>")
    page.press("Enter")
    page.call("Page.reload")
    page.click("button", "<b>dry</b>")
    assert page.evaluate(values) == {"humor": "2", "verbosity": "2", "wit": UNSET}
    page.click("button", "Delete preset <b>dry</b>")
    page.find("button", "<b>dry</b>", count=0)


def test_presets_without_a_storage_last_as_long_as_the_page(page: Browser) -> None:
    """The browser may forbid it; names of presets that are always there are refused."""
    forbid = "Object.defineProperty(window, 'localStorage', { get() { throw Error('no'); } })"
    script = page.call("Page.addScriptToEvaluateOnNewDocument", source=forbid)["identifier"]
    page.call("Page.reload")
    page.wait("window.send && !send.disabled")
    page.click("slider", "humor", at=0.5)
    page.click("button", "Save…")
    page.write("High")
    page.press("Enter")
    assert page.evaluate("document.querySelector('.presets input').matches(':invalid')")
    page.write(" 'ish\" 😀")
    page.press("Enter")
    assert "until this page is closed" in page.evaluate("document.all.status.textContent")
    page.click("button", "Low")
    page.click("button", "High 'ish\" 😀")
    assert page.evaluate("document.querySelector('.lane-0 output').textContent") == "2"
    page.click("button", "Delete preset High 'ish\" 😀")
    page.find("button", "High 'ish\" 😀", count=0)
    page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
    page.call("Page.reload")
    page.wait("window.send && !send.disabled")


def test_the_most_answers_are_the_servers(page: Browser, engine: Echo) -> None:
    with serving(app_of(engine, limits=SteeringLimits(max_n=3))) as address:
        page.open(address)
        page.wait("window.send && !send.disabled")
        page.evaluate("best_of.value = 4; shared.open = true")
        page.click(*QUESTION)
        page.write("Hello")
        page.press("Enter")
        assert page.evaluate("best_of.matches(':invalid')")
        assert page.evaluate("document.querySelectorAll('.answer').length") == 0


def test_candidates_of_best_of_can_be_looked_at_and_chosen(page: Browser, engine: Echo) -> None:
    """The nearest to a humor of 3 is the one with a 2 in it."""
    page.click("slider", "humor", at=0.75)
    page.click("spinbutton", "Best of")
    page.press("ArrowUp", times=3)
    ask(page, "Hello")
    assert page.evaluate(TEXTS) == ["Candidate 2."]
    assert "3.0 asked 3" in page.evaluate("document.querySelector('.bars').innerText")
    page.click("button", "Previous candidate")
    assert page.evaluate(TEXTS) == ["Hello Hello"]
    assert "1.0 asked 3" in page.evaluate("document.querySelector('.bars').innerText")
    ask(page, "Well?", 2)
    assert engine.asked[0][1].n == 4
    assert "Hello Hello" in engine.asked[1][0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_that_reading_needs(page: Browser, scheme: str) -> None:
    """4.5 between every text and what it stands on (WCAG 2.2, 1.4.3), with all that can show."""
    page.prefer(scheme)
    page.click("button", "Compare")
    ask(page, "long " * 600, 2)
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
