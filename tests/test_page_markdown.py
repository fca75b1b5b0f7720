"""What a model may write, in the page: markdown becomes elements, and nothing becomes code."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from browsing import ask, browsing, see, visiting
from pageserver import Broken, Server, Thought, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=2)]  # a browser on a busy machine paints when it likes
# render(text) in the page, without a conversation around it
RENDER = """async (text) => {
    const { render } = await import("/page/markdown.js");
    const node = document.createElement("div");
    render(node, text);
    return node.innerHTML;
}"""
# Feed text in pieces to one node, and whole to another: both must end up the same.
GROW = """async ([text, cuts]) => {
    const { render } = await import("/page/markdown.js");
    const [grown, whole] = [document.createElement("div"), document.createElement("div")];
    for (const cut of [...cuts, text.length]) render(grown, text.slice(0, cut));
    render(whole, text);
    return grown.innerHTML === whole.innerHTML;
}"""
# Names of elements and attributes that a text has become.
MADE = """async (texts) => {
    const { render } = await import("/page/markdown.js");
    const found = { tags: new Set(), attributes: new Set(), schemes: new Set(), lost: [] };
    for (const text of texts) {
        const node = document.createElement("div");
        render(node, text);
        for (const one of node.querySelectorAll("*")) {
            found.tags.add(one.localName);
            for (const { name } of one.attributes) found.attributes.add(name);
            if (one.localName === "a") found.schemes.add(one.protocol);
        }
        const kept = node.innerHTML + text.match(/`{3,}.*/g); // what follows a fence on its line names the language
        found.lost.push(...(text.match(/[a-z]{3,}/g) ?? []).filter((word) => !kept.includes(word)));
    }
    return Object.fromEntries(Object.entries(found).map(([name, values]) => [name, [...values]]));
}"""
TAGS = {
    "a",
    "b",
    "blockquote",
    "button",
    "code",
    "div",
    "em",
    "figcaption",
    "figure",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "li",
}
TAGS |= {"ol", "p", "pre", "s", "span", "strong", "svg", "table", "tbody", "td", "th", "thead", "tr", "ul", "use"}
ATTRIBUTES = {
    "aria-hidden",
    "aria-label",
    "class",
    "href",
    "rel",
    "role",
    "start",
    "tabindex",
    "target",
    "title",
    "type",
}
ATTACKS = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload=window.hacked=1><a xlink:href=javascript:window.hacked=1>x</a></svg>",
    "[click](javascript:window.hacked=1)",
    "[click](JaVaScRiPt:window.hacked=1)",
    "[click](  javascript:window.hacked=1 )",
    "[click](java\tscript:window.hacked=1)",
    "[click](data:text/html;base64,PHNjcmlwdD53aW5kb3cuaGFja2VkPTE8L3NjcmlwdD4=)",
    "[click](vbscript:x) [click](file:///etc/passwd) [click](//evil.example) [click](/v1/models)",
    "![x](https://evil.example/track.png) ![x](javascript:window.hacked=1)",
    '[x](https://a.example/"onmouseover="window.hacked=1)',
    "<https://a.example/\"onclick='window.hacked=1'>",
    "[![x](javascript:a)](https://a.example) [a [b](javascript:c) d](https://e.example)",
    '```"><script>window.hacked=1</script>\n</code></pre><script>window.hacked=1</script>\n```',
    "`<b>` **<i>bold</i>** | <u>a</u> |\n|--|\n| <script>window.hacked=1</script> |",
    "| a | <img src=x onerror=window.hacked=1> |\n|---|---|\n| [x](javascript:y) | b |",
    "# <iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "- <details ontoggle=window.hacked=1 open>\n  - <style>*{display:none}</style>",
    "1. <form action=javascript:window.hacked=1><button>x</button></form>",
    "$<script>window.hacked=1</script>$ \\(<img src=x onerror=window.hacked=1>\\)",
    "&lt;script&gt; &#60;img src=x onerror=window.hacked=1&#62;",
    "\u202e\u0000<scr\u0000ipt>window.hacked=1</scr\u0000ipt>",
    "<a href='https://a.example' target=_self>here</a><base href='https://evil.example'>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as running:
        yield running


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as told:
        yield told


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with visiting(browser, server.url) as opened:
        opened.locator("#model:enabled").wait_for()
        yield opened


def html(page: Page, text: str) -> str:
    return page.evaluate(RENDER, text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a **b** *c* ~~d~~", "<p>a <strong>b</strong> <em>c</em> <s>d</s></p>"),
        ("__a__ _b_", "<p><strong>a</strong> <em>b</em></p>"),
        ("***both***", "<p><strong><em>both</em></strong></p>"),
        ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
        ("2 * 3 * 4 and snake_case_name", "<p>2 * 3 * 4 and snake_case_name</p>"),
        ("**never ended and *this", "<p>**never ended and *this</p>"),
        (r"\*not\* \`code\`", "<p>*not* `code`</p>"),
        ("`a **b** <i>`", "<p><code>a **b** &lt;i&gt;</code></p>"),
        ("``a ` b``", "<p><code>a ` b</code></p>"),
        ("`open", "<p>`open</p>"),
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        ("# One #\n###### Six", "<h3>One</h3><h6>Six</h6>"),
        ("#hashtag", "<p>#hashtag</p>"),
        ("---", "<hr>"),
        ("> a\n> **b**\n\nc", "<blockquote><p>a\n<strong>b</strong></p></blockquote><p>c</p>"),
        ("$a_1 * b_2$ costs $5 and $6", "<p>$a_1 * b_2$ costs $5 and $6</p>"),
        (r"\(x_1 * y_2\) and \[a*b*c\]", r"<p>\(x_1 * y_2\) and \[a*b*c\]</p>"),
        ("$$\na_1 * b_2\n$$", '<p class="formula">$$\na_1 * b_2\n$$</p>'),
        ("<b>bold</b> & more", "<p>&lt;b&gt;bold&lt;/b&gt; &amp; more</p>"),
    ],
)
def test_markdown_becomes_elements(page: Page, text: str, wanted: str) -> None:
    assert html(page, text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("- a\n  - b\n    - c\n- d", "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>"),
        ("1. a\n   more\n\n   - b\n2. c", "<ol><li>a\nmore<ul><li>b</li></ul></li><li>c</li></ol>"),
        ("- a\n\n- b\n\nafter", "<ul><li>a</li><li>b</li></ul><p>after</p>"),
        ("text\n- a", "<p>text</p><ul><li>a</li></ul>"),
        ("in 1998.\n1998. was a year", "<p>in 1998.\n1998. was a year</p>"),
        ("- a\n1. b", "<ul><li>a</li></ul><ol><li>b</li></ol>"),
        ("* a\n* * *", "<ul><li>a</li></ul><hr>"),
    ],
)
def test_lists(page: Page, text: str, wanted: str) -> None:
    made = html(page, text).replace('<span class="tight">', "").replace("</span>", "")
    assert made == wanted


def test_code_keeps_every_character_and_has_a_button(page: Page) -> None:
    code = "def f(x):\n\treturn \"<a & b>\"  # `x`\n\n\nprint(f(0x1F), '''a\nb''')"
    counted = """async (text) => {
        const { render } = await import("/page/markdown.js");
        const node = document.createElement("div");
        render(node, text);
        const marked = [...node.querySelectorAll("pre span")].map((one) => one.className);
        return [node.querySelector("pre").textContent, node.querySelectorAll("button").length, marked.sort()];
    }"""
    for fence in ("```", "~~~~"):
        text, buttons, marked = page.evaluate(counted, f"{fence}python\n{code}\n{fence}\nafter")
        assert (text, buttons) == (code, 1)
        assert set(marked) == {"word", "called", "quoted", "remark", "number"}
    open_text, _, _ = page.evaluate(counted, f"```python\n{code}")
    assert open_text == code  # a block whose end has not come yet


def test_tables(page: Page) -> None:
    made = html(page, "| a | b |\n|:--|--:|\n| `x` | **2** |\n| only |\n\nafter")
    assert '<th class="to-start">a</th><th class="to-end">b</th>' in made
    assert '<td class="to-start"><code>x</code></td><td class="to-end"><strong>2</strong></td>' in made
    assert '<td class="to-start">only</td><td class="to-end"></td>' in made
    assert made.endswith("<p>after</p>")
    assert "<table>" not in html(page, "a | b\nc | d")


@pytest.mark.parametrize(
    ("text", "href", "label"),
    [
        ("[a](https://b.example/c_d)", "https://b.example/c_d", "a"),
        ("see https://b.example/x_(y).", "https://b.example/x_(y)", "https://b.example/x_(y)"),
        ("(http://b.example)", "http://b.example/", "http://b.example"),
        ("<https://b.example/*x*>", "https://b.example/*x*", "https://b.example/*x*"),
        ('[**a**](https://b.example "title")', "https://b.example/", "a"),
        ("![a picture](https://b.example/p.png)", "https://b.example/p.png", "a picture"),
    ],
)
def test_links_open_elsewhere_and_tell_nothing(page: Page, text: str, href: str, label: str) -> None:
    read = """async (text) => {
        const { render } = await import("/page/markdown.js");
        const node = document.createElement("div");
        render(node, text);
        return [...node.querySelectorAll("a")].map((a) => [a.href, a.textContent, a.rel, a.target]);
    }"""
    assert page.evaluate(read, text) == [[href, label, "noopener noreferrer", "_blank"]]


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_stays_text(page: Page, server: Server, attack: str) -> None:
    server.replies.append([Thought(attack), *attack, "\n\nthe end"])
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    ask(page, attack)
    see(page, "the end")
    page.locator(".stats li").first.wait_for()
    page.locator(".thoughts summary").click()
    for link in page.locator("#messages a").all():
        assert str(link.get_attribute("href")).startswith(("https://", "http://"))
    made = page.evaluate("[...document.querySelectorAll('#messages *, #conversations *')].map((one) => one.localName)")
    assert set(made) <= TAGS | {"article", "details", "summary"}
    names = "[...document.querySelectorAll('#messages *')].flatMap((one) => one.getAttributeNames())"
    assert not [name for name in page.evaluate(names) if name.startswith("on") or name in ("style", "src", "srcdoc")]
    page.reload()
    see(page, "the end")
    assert page.evaluate("window.hacked") is None
    assert [url for url in asked if not url.startswith(server.url)] == []


def test_errors_and_names_of_the_server_stay_text_too(page: Page, server: Server) -> None:
    server.replies.append(["begun", Broken("<img src=x onerror=window.hacked=1>")])
    ask(page, "Hello")
    see(page, "<img src=x onerror=window.hacked=1>")
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_random_text_becomes_known_elements_and_loses_no_word(page: Page) -> None:
    rng = random.Random(0)
    bits = [
        "*",
        "**",
        "_",
        "__",
        "`",
        "```",
        "~~",
        "[",
        "](",
        ")",
        "![",
        "<",
        ">",
        "|",
        "\n",
        "\n\n",
        "  ",
        "- ",
        "1. ",
    ]
    bits += [
        "# ",
        "> ",
        "---",
        "\\",
        "$",
        "$$",
        "\\(",
        "\\[",
        "abc",
        "defg",
        "https://",
        "javascript:",
        "<script>",
        '"',
    ]
    texts = ["".join(rng.choices(bits, k=rng.randint(1, 60))) for _ in range(3000)]
    found = page.evaluate(MADE, texts)
    assert set(found["tags"]) <= TAGS
    assert set(found["attributes"]) <= ATTRIBUTES
    assert set(found["schemes"]) <= {"http:", "https:"}
    assert found["lost"] == []


def test_text_that_grows_ends_up_as_if_it_had_come_whole(page: Page) -> None:
    rng = random.Random(1)
    bits = ["word ", "*", "**", "`", "\n```py\n", "\n", "\n\n", "\n- ", "\n  - ", "\n1. ", "\n> ", "| x |"]
    bits += ["\n| a | b |\n|--|--|\n"]
    for _ in range(60):
        text = "".join(rng.choices(bits, k=60))
        cuts = sorted(rng.sample(range(len(text)), 12))
        assert page.evaluate(GROW, [text, cuts]), text


@pytest.mark.parametrize(
    "text",
    [
        "*a " * 20000,
        "**" * 20000,
        "[" * 20000,
        "[a](" * 10000,
        "`" * 20001 + "a",
        "`a" * 20001,
        "$" * 20001,
        "\\(" * 20000,
        "_a" * 20000,
        "<" * 20000,
        "https://a.b/" + "(" * 20000,
        "> " * 5000 + "a",
        "- " * 5000 + "a",
        "| a " * 10000 + "\n" + "|-" * 10000 + "\n" + "| b " * 10000,
        "```" + " " * 20000 + "`",
        "# a" + " " * 20000 + "b",
        "-" * 20000 + "x",
        "\n" * 20000,
        "- a\n" + "\n" * 20000 + "b",
        "~~a " * 20000,
        "```js\n" + "/*" * 10000 + "\n```",
        "```js\n" + "'" * 20000 + "\n```",
    ],
    ids=range(22),
)
def test_no_text_keeps_the_page_from_answering(page: Page, text: str) -> None:
    """A pattern that goes back and forth over such a text would take minutes; these take milliseconds."""
    draw = """(text) => {
        setTimeout(async () => {
            const { render } = await import("/page/markdown.js");
            render(document.createElement("div"), text);
            document.body.dataset.drawn = "1";
        });
    }"""
    page.evaluate(draw, text)
    page.locator("body[data-drawn]").wait_for(timeout=20_000)
