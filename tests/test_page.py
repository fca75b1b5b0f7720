"""The web page by its rules (no browser needed), and in Debian's chromium (slow)."""

from __future__ import annotations

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pageserver import PAGE, TYPES

ROOT = PAGE.parent.parent
MAX_NBYTES = 150_000
MAX_LINES = 400
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, not an address
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SCRIPTS = sorted(PAGE.glob("*.js"))
FILES = [path for path in sorted(PAGE.iterdir()) if path.suffix in TYPES]


class _Elements(HTMLParser):
    """Every element with its attributes, and the text inside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.fixture(scope="module")
def elements() -> _Elements:
    parser = _Elements()
    parser.feed((PAGE / "index.html").read_text(encoding="utf-8"))
    return parser


def test_the_page_is_a_few_small_files() -> None:
    assert sum(path.stat().st_size for path in FILES) < MAX_NBYTES
    assert {path.name: len(path.read_text("utf-8").splitlines()) <= MAX_LINES for path in FILES} == {
        path.name: True for path in FILES
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_another_server(path: Path) -> None:
    text = path.read_text("utf-8")
    assert set(re.findall(r"(?:https?|wss?)://[\w-]+[.:][^\s\"'<)]*", text)) <= {NAMESPACE}
    assert re.findall(r"[\"'(]//\w", text) == []


def test_nothing_is_inline_so_that_the_strictest_policy_holds(elements: _Elements) -> None:
    assert elements.inline == []
    for tag, attributes in elements.found:
        assert tag not in ("style", "base", "iframe", "object", "embed")
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcdoc")]
        assert tag != "script" or attributes["src"]
    policies = [str(value["content"]) for tag, value in elements.found if value.get("http-equiv")]
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    assert "unsafe" not in policies[0]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_text_never_becomes_markup_or_code(path: Path) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc"
    forbidden += r"|\beval\b|new Function|setAttribute\(\"(?:style|on)|javascript:|set(?:Timeout|Interval)\(\s*[\"'`]"
    assert re.findall(forbidden, path.read_text("utf-8")) == []


def test_what_files_refer_to_is_there(elements: _Elements) -> None:
    ids = [str(value["id"]) for _, value in elements.found if "id" in value]
    assert len(ids) == len(set(ids))
    code = "\n".join(path.read_text("utf-8") for path in SCRIPTS)
    settings = re.search(r"DEFAULTS = Object.freeze\(\{(.*?)\}\)", code, re.DOTALL)
    assert settings is not None
    named = {f"set-{name}" for name in re.findall(r"(\w+):", settings[1])}
    named |= set(re.findall(r"\$\(\"([\w-]+)\"\)", code))
    for attribute in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
        named |= {str(value[attribute]) for _, value in elements.found if attribute in value}
    assert named <= set(ids)
    icons = set(re.findall(r"(?:icon|iconButton)\(\"(\w+)\"", code)) | {"system", "light", "dark"}
    assert {f"icon-{name}" for name in icons} <= set(ids)
    files = [str(value.get("src") or value.get("href")) for tag, value in elements.found if tag in ("script", "link")]
    assert [name for name in files if not (PAGE.parent / name).is_file()] == []


def test_modules_import_what_others_export() -> None:
    for path in SCRIPTS:
        text = path.read_text("utf-8")
        for names, module in re.findall(r"import \{([^}]*)\} from \"\./([\w.]+)\"", text):
            other = (PAGE / module).read_text("utf-8")
            exported = set(re.findall(r"^export (?:async )?(?:function\*?|const|class) ([\w$]+)", other, re.MULTILINE))
            assert {name.strip() for name in names.split(",") if name.strip()} <= exported, path.name


def test_every_control_has_a_name(elements: _Elements) -> None:
    labelled = {value["for"] for tag, value in elements.found if tag == "label"}
    for tag, value in elements.found:
        if tag in ("input", "textarea", "select"):
            assert value.get("aria-label") or value.get("id") in labelled or value.get("aria-hidden"), value


def test_the_wheel_takes_every_file_along() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "rlkit.apps.page" in tools["packages"]
    patterns = tools["package-data"]["*"]
    assert [path.name for path in FILES if f"*{path.suffix}" not in patterns] == []
    kept = {path.name for path in PAGE.iterdir() if path.is_file()}
    assert kept == {path.name for path in FILES} | {"__init__.py"}


def test_shortcuts_listed_are_those_there_are() -> None:
    code = (PAGE / "app.js").read_text("utf-8")
    keys = set(re.findall(r"^  Key(\w):", code, re.MULTILINE))
    listed = set(re.findall(r"<kbd>Alt</kbd><kbd>(\w)</kbd>", (PAGE / "index.html").read_text("utf-8")))
    assert keys == listed
    assert len(keys) > 5
