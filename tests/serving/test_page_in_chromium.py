"""The chat page in a real Chromium; ``python -m pytest -m real_model tests/serving`` drives it where there is one.

``SCREENSHOTS=folder`` keeps what it looks like.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from served_models import TEMPLATE, serving, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def address():
    with serving(tiny_model(context_length=100_000), tiny_tokenizer()) as (url, _):
        yield url


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    opened = context.new_page()
    opened.problems = []
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("console", lambda message: message.type == "error" and opened.problems.append(message.text))
    opened.goto(address)
    yield opened
    assert opened.problems == []
    context.close()


def keep(page, name):
    if "SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / f"{name}.png")


def limit(page, tokens, temperature=0):
    page.keyboard.press("Alt+s")
    page.fill("[name=max_tokens]", str(tokens))
    page.fill("[name=temperature]", str(temperature))
    page.click("text=Done")


def send(page, text):
    page.fill("#input", text)
    page.keyboard.press("Enter")


def wait_for_end(page):
    page.wait_for_selector("#send:text('Send')")


def test_conversation_is_streamed_kept_and_regenerated(page):
    limit(page, 30)
    send(page, "Hello there")
    wait_for_end(page)
    answer = page.inner_text(".turn.assistant .body")
    assert len(answer) >= 25
    assert "30 tokens" in page.inner_text(".turn.assistant .actions")
    keep(page, "answer")
    page.click("text=Regenerate")
    wait_for_end(page)
    assert page.inner_text(".turn.assistant .body") == answer  # greedy
    page.reload()
    assert page.inner_text(".turn.assistant .body") == answer
    page.keyboard.press("Alt+n")
    send(page, "Another one")
    wait_for_end(page)
    assert page.locator("#list li").count() == 2
    page.on("dialog", lambda dialog: dialog.accept())
    page.hover("#list li:nth-child(1)")
    page.click("#list li:nth-child(1) .delete")
    assert page.locator("#list li").count() == 1
    assert page.inner_text(".turn.user .body") == "Hello there"


def test_stop_keeps_what_came(page):
    limit(page, 90_000)
    send(page, "Tell me everything")
    page.locator(".turn.running .body", has_text=re.compile(".{5}", re.DOTALL)).wait_for()
    keep(page, "running")
    page.keyboard.press("Escape")
    wait_for_end(page)
    assert "stopped" in page.inner_text(".turn.assistant .actions")
    assert page.inner_text(".turn.assistant .body")


def test_tabs_keep_each_others_conversations(page, address):
    limit(page, 8)
    other = page.context.new_page()
    other.goto(address)
    send(page, "First of one tab")
    wait_for_end(page)
    other.wait_for_selector("#list li .open:text('First of one tab')")
    other.keyboard.press("Alt+n")
    send(other, "Second of another tab")
    wait_for_end(other)
    page.wait_for_selector("#list li .open:text('Second of another tab')")
    assert page.inner_text("#title").startswith("First of one tab")
    page.bring_to_front()  # a hidden page draws nothing
    limit(page, 90_000)
    send(page, "A long one")
    page.locator(".turn.running .body", has_text=re.compile(".{5}", re.DOTALL)).wait_for()
    send(other, "More")  # in its own conversation, while the first tab writes
    other.keyboard.press("Escape")
    wait_for_end(other)
    page.keyboard.press("Escape")
    wait_for_end(page)
    page.reload()
    assert page.locator("#list li").count() == 2
    page.click("#list li .open:text('Second of another tab')")
    assert page.locator(".turn.user .body").all_inner_texts() == ["Second of another tab", "More"]
    page.click("#list li .open:text('First of one tab')")
    assert page.locator(".turn.user .body").all_inner_texts() == ["First of one tab", "A long one"]
    keep(page, "two-tabs")


def test_a_conversation_goes_on_after_an_empty_answer(page):
    chunk = '{"choices": [{"index": 0, "delta": {"content": "%s"}, "finish_reason": "stop"}]}'
    texts, bodies = ["", "Yes."], []

    def answer(route):
        bodies.append(route.request.post_data_json)
        body = f"data: {chunk % texts.pop(0)}\n\ndata: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)
    for text in ("Hello", "Are you there?"):
        send(page, text)
        wait_for_end(page)
    keep(page, "empty")
    assert "the model said nothing" in page.inner_text(".turn.assistant >> nth=0")
    assert page.inner_text(".turn.assistant .body >> nth=1") == "Yes."
    assert bodies[1]["messages"] == [{"role": "user", "content": "Hello\n\nAre you there?"}]


def test_markup_of_the_model_is_text(page):
    page.evaluate(
        """() => localStorage.setItem('lightning-lm-chats', JSON.stringify([{id: 'a', title: 'Code', turns: [
        {role: 'user', content: '<img src=x onerror=alert(1)> Write a loop.'},
        {role: 'assistant', content: 'A **loop** over `i`:\\n\\n```python\\nfor i in range(3):\\n    print(i)  # ' +
        'a long comment that does not fit into the width of a telephone and therefore scrolls\\n```\\n\\n' +
        'It prints three lines. <b>Not bold.</b>', note: '40 tokens, 21.0/s'}]}]))"""
    )
    page.reload()
    assert page.locator("img, .body b").count() == 0
    assert page.inner_text(".turn.assistant pre").startswith("for i in range(3):")
    assert page.inner_text(".turn.assistant strong") == "loop"
    keep(page, "wide")
    page.click("#theme")
    keep(page, "dark")
    page.keyboard.press("Alt+s")
    keep(page, "settings-dark")
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 390, "height": 780})
    keep(page, "narrow-dark")
    page.click("#theme")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    keep(page, "narrow")
    page.click("#menu")
    page.wait_for_timeout(300)
    keep(page, "drawer")


def test_missing_key_and_errors_are_shown(browser):
    with serving(tiny_model(context_length=64), tiny_tokenizer(template=TEMPLATE), api_key="secret") as (url, _):
        page = browser.new_context(viewport={"width": 900, "height": 700}).new_page()
        page.goto(url)
        page.wait_for_selector("dialog[open]")
        page.fill("[name=key]", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector(".empty strong:text('tiny')")
        send(page, "word " * 40)
        wait_for_end(page)
        assert "a context of 64 tokens" in page.inner_text(".error")
        keep(page, "error")
