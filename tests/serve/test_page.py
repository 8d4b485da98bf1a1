"""The chat page in a browser, without a network: what a reader sees and does."""

import os
import shutil
from pathlib import Path

import pytest

from tests.serve.scripted import END, Script, serve, wait_until

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
if not BROWSER:
    pytest.skip("no Chromium on this machine", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ANSWER = "<think>\nOne and one.\n</think>\n\nIt is **2**:\n```python\nprint(1 + 1)  # <b>2</b>\n```\nDone." + END
LOADS = [{"name": f"moe {n}", "load": [(e * (n + 3)) % 17 for e in range(32)]} for n in range(4)]


@pytest.fixture(scope="module")
def script():
    return Script()


@pytest.fixture(scope="module")
def served(script):
    made = serve(script, name="r1", n_positions=2000)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser, served, script):
    script.__init__()
    page = browser.new_page(viewport={"width": 900, "height": 700})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    expected = ["Failed to load resource: the server responded with a status of 400 (Bad Request)"]
    page.goto(served.url)
    yield page
    page.close()
    assert errors in ([], expected)


def picture(page, name):
    """Keeps a screenshot for people to look at, if a folder for them is named."""
    if folder := os.environ.get("DEEPSEEK_JAX_PICTURES"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_an_answer_is_streamed_its_thought_folded_and_its_code_apart(page, script):
    script.answer = lambda prompt: ANSWER
    assert page.inner_text("h1") == "mine"
    page.fill("#message", "What is <i>1+1</i>?")
    page.press("#message", "Enter")
    page.wait_for_selector(".numbers")
    assert page.inner_text("article.user") == "What is <i>1+1</i>?"
    thought = page.locator("details.thought")
    assert thought.get_attribute("open") is None and "Thought for" in thought.inner_text()
    thought.locator("summary").click()
    assert "One and one." in thought.inner_text()
    assert page.inner_text("article.assistant strong") == "2"
    assert page.inner_text("article.assistant pre").strip() == "print(1 + 1)  # <b>2</b>"
    numbers = page.inner_text(".numbers")
    assert "tokens/s" in numbers and "prompt tokens from the cache" in numbers and "first after" in numbers
    picture(page, "answer")
    page.fill("#message", "And now?")
    page.press("#message", "Enter")
    page.wait_for_selector("article.assistant:nth-of-type(4) .numbers")
    assert "It is **2**" in script.prompts[1] and "One and one" not in script.prompts[1]
    page.click("#new")
    assert page.locator("article").count() == 0 and page.is_visible("#empty")


SPLIT = """
([text, seed]) => {
  const whole = document.createElement("div"), parts = document.createElement("div");
  new Writer(whole).push(text).finish();
  const writer = new Writer(parts);
  let first = null;
  for (let at = 0; at < text.length;) {
    seed = (seed * 1103515245 + 12345) % 2147483648;
    const size = 1 + (seed >> 16) % 4;
    writer.push(text.slice(at, at + size));
    first ||= parts.firstChild;
    at += size;
  }
  writer.finish();
  return [whole.innerHTML, parts.innerHTML, first === parts.firstChild];
}
"""
TEXTS = {
    "a\n```python\nx = `1`\n**y**\n```\n`z` and **b**.\n": '<div class="text">a\n</div>'
    '<pre class="">x = `1`\n**y**\n</pre>'
    '<div class="text"><code class="">z</code> and <strong class="">b</strong>.\n</div>',
    "2 * 3 ** 4, **a\n*b* `c\n`d` <b>": '<div class="text">2 * 3 ** 4, **a\n*b* `c\n<code class="">d</code>'
    " &lt;b&gt;</div>",
    "Code: `` x\n```\nno end": '<div class="text">Code: `` x\n</div><pre class="">no end</pre>',
}


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_is_written_once_and_the_same_in_any_parts(page, text):
    for seed in range(20):
        assert page.evaluate(SPLIT, [text, seed]) == [TEXTS[text], TEXTS[text], True]


def test_an_answer_can_be_stopped(page, script, served):
    script.answer, script.speed, script.delay_s = lambda prompt: "word " * 300, 1, 0.01
    page.fill("#message", "Talk")
    page.click("#send")
    page.wait_for_selector("article.assistant .text")
    assert page.is_visible("#stop") and not page.is_visible("#send")
    picture(page, "writing")
    page.click("#stop")
    page.wait_for_selector(".numbers")
    assert page.inner_text(".numbers") == "Stopped."
    wait_until(lambda: script.is_idle and served.worker.n_open == 0)
    assert page.is_visible("#send")


def test_a_new_chat_knows_nothing_of_an_answer_that_it_stopped(page, script, served):
    script.answer, script.speed, script.delay_s = lambda prompt: "word " * 300, 1, 0.01
    page.fill("#message", "Talk")
    page.click("#send")
    page.wait_for_selector("article.assistant .text")
    page.click("#new")
    page.wait_for_selector("#send")
    script.__init__()
    page.fill("#message", "Again")
    page.click("#send")
    page.wait_for_selector(".numbers")
    assert "word" not in script.prompts[-1] and "Talk" not in script.prompts[-1]


def test_settings_reach_the_server_and_errors_the_reader(page, script):
    page.click("#open-settings")
    for name, value in {"temperature": "0.5", "top_p": "0.9", "max_tokens": "3", "seed": "7", "system": "Be"}.items():
        page.fill(f"#{name}", value)
    page.select_option("#thinking", "enabled")
    picture(page, "settings")
    page.fill("#message", "Hi")
    page.press("#message", "Enter")
    page.wait_for_selector("article.assistant .numbers")
    assert page.inner_text(".numbers").startswith("3 tokens, then cut off")
    found = script.samplings[0]
    assert (found.temperature, found.top_p, found.max_new_tokens, found.seed) == (0.5, 0.9, 3, 7)
    assert script.prompts[0].startswith("<｜begin▁of▁sentence｜>Be<｜User｜>")
    assert script.prompts[0].endswith("<think>\n")
    page.fill("#temperature", "0")
    page.fill("#message", "x" * 450)
    page.press("#message", "Enter")
    page.wait_for_selector(".error")
    assert "too long" in page.inner_text(".error") and page.input_value("#message") == "x" * 450


def test_the_loads_of_experts_are_drawn(page):
    page.route("**/experts", lambda route: route.fulfill(json={"layers": LOADS}))
    page.click("#tab-experts")
    page.wait_for_selector("canvas")
    assert page.locator("canvas").count() == 4 and not page.is_visible("#form")
    assert page.locator("canvas").first.get_attribute("aria-label").startswith("moe 0: the fullest expert has 2.0")
    picture(page, "experts")
    page.click("#tab-chat")
    assert page.is_visible("#form")


@pytest.mark.parametrize("look", ["dark", "narrow"])
def test_other_screens(browser, served, script, look):
    script.__init__()
    script.answer = lambda prompt: ANSWER
    width = 360 if look == "narrow" else 900
    page = browser.new_page(
        viewport={"width": width, "height": 640}, color_scheme="dark" if look == "dark" else "light"
    )
    page.goto(served.url)
    page.fill("#message", "A long question, which takes several lines on a narrow screen, and one more word.")
    page.press("#message", "Enter")
    page.wait_for_selector(".numbers")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    picture(page, look)
    page.close()
