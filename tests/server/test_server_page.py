"""The page at / in Chromium: text as it comes, accepted tokens marked, and the comparison."""

import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs Chromium", allow_module_level=True)

PROMPT = "abcabcabc"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (400, "dark")])
def test_the_page_shows_what_comes(browser, address, alone, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda one: complaints.append(one.url) if not one.url.startswith((address, "data:")) else None,
    )
    page.goto(address)
    page.fill("#tokens", "60")
    page.fill("#prompt", PROMPT)
    # by keyboard: the check box, and the key that sends
    page.focus("#chat")
    page.keyboard.press("Space")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.locator("#verdict:not(:empty), #wrong:not(:empty)").first.wait_for(timeout=60_000)
    assert page.text_content("#wrong") == ""
    assert "the text is the same" in page.text_content("#verdict")
    text = alone(PROMPT, max_new_tokens=60, do_sample=False)[1]
    assert page.text_content("#drafted") == page.text_content("#plain") == text
    marked = page.locator("#drafted .accepted").all_text_contents()
    assert len("".join(marked)) > 10
    assert page.locator("#plain .accepted").count() == 0
    assert "tokens/s" in page.text_content("#drafted-numbers")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 27)"}[scheme]
    # nothing to scroll sideways
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not complaints
    page.close()


@pytest.mark.slow
def test_the_page_tells_what_was_wrong(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.fill("#prompt", "x" * 400)
    page.click("#go")
    page.locator("#wrong:not(:empty)").wait_for()
    assert "the prompt has" in page.text_content("#wrong")
    assert page.is_enabled("#go")
    page.close()
