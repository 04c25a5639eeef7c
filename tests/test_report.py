"""`python -m sssd report`: the page, and what Chromium makes of it."""

import base64
import gzip
import json
import re
import shutil

import numpy as np
import pytest

from sssd import Drafter
from sssd.cli import main
from sssd.pictures.steps import Steps
from sssd.replay import Replay, Request

HOSTILE = '</script><script>document.title="taken"</script><img src=x onerror=\'document.title="taken"\'>'
WORDS = [HOSTILE, " the", " cat\n", " sat", " <b>on</b>", " a mat", " \u202e"]


def decode(ids):
    return "".join(WORDS[token % len(WORDS)] for token in ids)


def requests(number=4):
    """Requests that repeat their prompt, with a word of their own here and there."""
    random = np.random.default_rng(3)
    for _ in range(number):
        prompt = random.integers(0, 50, 40)
        response = np.where(random.random(40) < 0.15, random.integers(0, 50, 40), prompt)
        yield Request(prompt.astype(np.int32), response.astype(np.int32))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page by the command, with texts: a tokenizer of hostile words."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("report")
    model = tokenizers.models.WordLevel({f"{i}{WORDS[i % len(WORDS)]}": i for i in range(50)}, unk_token="1")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    for name in ("chat", "<img src=x>"):
        lines = [
            json.dumps({"prompt_ids": r.prompt_ids.tolist(), "response_ids": r.response_ids.tolist()})
            for r in requests()
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    traces = sorted(map(str, folder.glob("*.jsonl")))
    out = folder / "report.html"
    options = ["--tokenizer", str(folder / "tokenizer.json"), "--title", HOSTILE, "--quiet"]
    assert main(["report", *traces, "-o", str(out), "--json", str(folder / "figures.json"), *options]) == 0
    return out


def unpacked(page):
    packed = re.findall(
        r'<script type="application/octet-stream" id="r\d+">([\w+/=]+)</script>', page.read_text()
    )
    return [json.loads(gzip.decompress(base64.b64decode(data))) for data in packed]


def test_steps_are_those_of_the_replay():
    (request,) = requests(1)
    replay, steps = Replay(8), Steps("name", request, decode)
    replay.run(Drafter(), request, steps)
    assert len(steps.steps) == replay.steps
    assert [step["to"] for step in steps.steps[:-1]] == [step["from"] for step in steps.steps[1:]]
    assert steps.steps[-1]["to"] == len(request.response_ids)
    assert sum(map(bool, steps.sources)) == replay.accepted
    for step in steps.steps:
        accepted = len(re.findall(r'class="s\d in"', step["svg"]))
        assert accepted + (1 if 'class="bonus' in step["svg"] else 0) == step["to"] - step["from"]


def test_a_step_says_why_no_more_was_accepted():
    prompt, response = np.array([1, 2, 3, 4, 9, 1], np.int32), np.array([2, 3, 5, 6], np.int32)
    steps = Steps("name", Request(prompt, response))
    Replay(8).run(Drafter(), Request(prompt, response), steps)
    whys = [step["why"] for step in steps.steps]
    assert "1 accepted; the target said “5” after “3”, where the draft has “4”" in whys[0]
    assert whys[-1].startswith("Nothing was drafted")


def test_steps_are_limited():
    (request,) = requests(1)
    steps = Steps("name", request, None, 3)
    Replay(8).run(Drafter(), request, steps)
    data = json.loads(gzip.decompress(base64.b64decode(steps.packed())))
    assert len(data["steps"]) == 3
    assert data["left"] == 40 - data["steps"][-1]["to"] > 0
    assert len(data["tokens"]) == len(data["sources"]) == data["steps"][-1]["to"]


def test_the_page_holds_the_figures_and_no_text_that_acts(page):
    text = page.read_text()
    rows = json.loads((page.parent / "figures.json").read_text())["results"]
    assert len(rows) == 2 * 3
    assert all(f"{row['tokens_per_step']:.3f}" in text for row in rows)
    assert HOSTILE not in text
    assert "<img" not in text
    assert text.count("<script>") == 1
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert len(unpacked(page)) == 4
    assert any("<b>on</b>" in token for data in unpacked(page) for token in data["tokens"])


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium-headless-shell", "chromium", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium-headless-shell")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, page):
    """The page in Chromium, as wide as a phone, and what went wrong there."""
    view = browser.new_page(viewport={"width": 400, "height": 800})
    view.wrong = []
    view.on("pageerror", lambda error: view.wrong.append(str(error)))
    view.on(
        "request", lambda request: view.wrong.append(request.url) if request.url != page.as_uri() else None
    )
    view.goto(page.as_uri())
    view.wait_for_selector("#viewer[data-ready=r0]")
    yield view
    assert view.wrong == []
    view.close()


def place(view):
    return int(view.inner_text("#place").split("/")[0])


def test_chromium_runs_no_text_and_fetches_nothing(opened):
    assert opened.title() == HOSTILE
    assert opened.inner_text("h1") == HOSTILE
    assert opened.locator("img").count() == 0
    # nor would a script that had found its way in run
    opened.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.taken = 1'}))"
    )
    assert opened.evaluate("window.taken") is None


def test_chromium_steps_by_keys_buttons_slider_and_text(opened, page):
    first = unpacked(page)[0]
    total = len(first["steps"])
    assert opened.inner_text("#place").endswith(f"/ {total}")
    for _ in range(total):
        opened.click("#back")
    assert place(opened) == 1
    seen = []
    opened.focus("#step")
    for step in first["steps"]:
        seen.append(opened.inner_text("#why"))
        assert opened.locator("#tree svg").count() == 1
        accepted = opened.locator("#tree g.in").count()
        now = opened.locator("#text .now").all_text_contents()
        assert len(now) == step["to"] - step["from"] >= accepted
        assert "".join(now) == "".join(first["tokens"][step["from"] : step["to"]])
        opened.keyboard.press("ArrowRight")
    assert seen == [step["why"] for step in first["steps"]]
    assert place(opened) == total
    opened.locator("#text [data-step='0']").first.click()
    assert place(opened) == 1
    opened.click("#on")
    assert place(opened) == 2
    opened.focus("#viewer")
    opened.keyboard.press("ArrowLeft")
    assert place(opened) == 1


def test_chromium_shows_another_request(opened, page):
    opened.select_option("#request", "r3")
    opened.wait_for_selector("#viewer[data-ready=r3]")
    assert opened.inner_text("#place").endswith(f"/ {len(unpacked(page)[3]['steps'])}")


def test_chromium_fits_a_phone_and_both_lights(opened):
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400
    grounds = set()
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        look = "getComputedStyle(document.body)"
        ground, ink = opened.evaluate(f"[{look}.backgroundColor, {look}.color]")
        light = [sum(map(int, re.findall(r"\d+", color))) / 3 for color in (ground, ink)]
        assert abs(light[0] - light[1]) > 150
        assert opened.evaluate("getComputedStyle(document.querySelector('#tree text')).fill") == ink
        grounds.add(ground)
    assert len(grounds) == 2


def test_chromium_reaches_everything_by_tab(opened):
    opened.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(16):
        opened.keyboard.press("Tab")
        reached.append(opened.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"SUMMARY", "viewer", "request", "back", "step", "on"} <= set(reached)
    assert all(
        opened.evaluate(
            f"!!(document.getElementById('{name}').labels?.length "
            f"|| document.getElementById('{name}').getAttribute('aria-label'))"
        )
        for name in ("request", "step", "back", "on")
    )
