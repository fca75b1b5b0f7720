"""`rlkit card` and `rlkit push`: what is sent to a stand-in hub, what is refused, and what failures say."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from huggingface_hub import constants

import tiny
from rlkit.apps import errors, publish
from rlkit.export.build import export_bundle
from rlkit.recover.atomic import sha256

REPO = "ann/small-onnx"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the stand-in holds: repositories by name, whether they are private, and the files sent."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.commits: list[str] = []
        self.refusal: tuple[str, int] | None = None  # part of an address, status
        self.tokens: set[str] = set()
        self.lfs_above = 10**9
        self.endpoint = ""


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if name not in self.hub.private:
            self._send(404, {"error": "Repository not found"})
            return
        self._send(200, {"id": name, "modelId": name, "sha": COMMIT, "private": self.hub.private[name], "siblings": []})

    def do_PUT(self) -> None:
        self.hub.large[self.path.rpartition("/")[2]] = self._body()
        self._send(200, {})

    def do_POST(self) -> None:
        body, path = self._body(), self.path
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        if self.hub.refusal is not None and self.hub.refusal[0] in path:
            self._send(self.hub.refusal[1], {"error": "you shall not pass"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/objects/batch"):
            self._send(200, {"objects": [self._place(entry) for entry in json.loads(body)["objects"]]})
        elif "/preupload/" in path:
            self._send(200, {"files": [self._mode(entry) for entry in json.loads(body)["files"]]})
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._send(200, {"warnings": [], "errors": []})  # api/validate-yaml

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.hub.private else 200
        self.hub.private.setdefault(name, asked.get("private") is True or asked.get("visibility") == "private")
        self._send(status, {"url": f"{self.hub.endpoint}/{name}"})

    def _mode(self, entry: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if entry["size"] > self.hub.lfs_above else "regular"
        return {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _place(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {**entry, "actions": {"upload": {"href": f"{self.hub.endpoint}/large/{entry['oid']}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.large[value["oid"]]
            else:
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
        self._send(200, {"commitUrl": f"{self.hub.endpoint}/x/y/commit/{COMMIT}", "commitOid": COMMIT})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(Hub()) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle")


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    for file in exported.rglob("*"):
        if file.is_file():
            (folder / file.relative_to(exported)).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.relative_to(exported)).write_bytes(file.read_bytes())
    return folder


def command(function: Callable[..., None], *words: object) -> int:
    """Call a command as the shell would; its exit code."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(function)
    try:
        typer.main.get_command(app).main([str(word) for word in words], standalone_mode=False)
    except Exception as error:
        return errors.report(error)
    return 0


def push(*words: object) -> int:
    return command(publish.push, *words)


def card(*words: object) -> int:
    return command(publish.card, *words)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error: one line, and nothing on standard output."""
    out, err = capsys.readouterr()
    found = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(found) == 1 and "Traceback" not in err
    return found[0]


def manifest(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "rlkit.json").read_text())
    return found


def files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def test_a_push_sends_the_bundle_as_one_commit(hub: Hub, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / ".env").write_text("HF_TOKEN=hf_secret")
    (bundle / "notes.txt").write_text("mine")
    assert push(bundle, REPO) == 0
    out, err = capsys.readouterr()
    assert out == f"{hub.endpoint}/{REPO}\n"
    assert "left out, as the manifest does not name them: .env, notes.txt" in err and "no license is stated" in err
    assert hub.files == files(bundle, [*manifest(bundle)["sha256"], "rlkit.json"])
    assert len(hub.commits) == 1 and hub.commits[0].endswith("for cpu with rlkit")
    assert hub.private == {REPO: False} and hub.tokens == {"Bearer hf_secret"}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's client
def test_large_files_arrive_whole(hub: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.lfs_above = 10_000
    assert push(bundle, REPO) == 0
    assert set(hub.large) == {sha256(file) for file in bundle.iterdir() if file.stat().st_size > 10_000}
    assert hub.files == files(bundle, [*manifest(bundle)["sha256"], "rlkit.json"])


def test_a_second_push_replaces_the_first(hub: Hub, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(bundle, REPO, "--private") == 0
    assert card(bundle, "--license", "MIT", "--push", REPO, "--private", "--json") == 0
    assert hub.private == {REPO: True} and len(hub.commits) == 2
    assert hub.files["README.md"].startswith(b'---\nlicense: "mit"\n')
    found = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert found["repo"] == REPO and found["commit"] == COMMIT and found["url"] == f"{hub.endpoint}/{REPO}"
    assert found["nbytes"] == sum(len(data) for data in hub.files.values())


def test_private_is_not_silently_public(hub: Hub, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.private[REPO] = False
    assert push(bundle, REPO, "--private") == 2
    assert "exists and is public, so nothing was sent" in one_line(capsys)
    assert hub.files == {}


def test_a_dry_run_checks_and_asks_nobody(hub: Hub, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.refusal = ("", 500)
    assert push(bundle, REPO, "--dry-run", "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["files"] == [*sorted(manifest(bundle)["sha256"]), "rlkit.json"] and found["url"] is None and err == ""
    assert push(bundle, REPO, "--dry-run") == 0
    assert "nothing is sent with --dry-run" in capsys.readouterr().err
    assert hub.tokens == set()


def changed(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)


def edited_card(bundle: Path) -> None:
    (bundle / "README.md").write_text("# the best model ever")


def missing(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()


def naming(name: str) -> Callable[[Path], None]:
    """Let the manifest name another file, with its true hash."""

    def change(bundle: Path) -> None:
        target = bundle / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("secret")
        found = manifest(bundle)
        found["sha256"][name] = sha256(target)
        (bundle / "rlkit.json").write_text(json.dumps(found))

    return change


def linked(bundle: Path) -> None:
    (bundle.parent / "outside.txt").write_text("secret")
    (bundle / "inside.txt").symlink_to(bundle.parent / "outside.txt")
    naming("inside.txt")(bundle)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed, "model.onnx.data is not the file that rlkit.json states, so nothing was sent; export it again"),
        (edited_card, "run `rlkit card "),
        (missing, "lacks tokenizer.json, so it is incomplete; export it again"),
        (naming(".env"), "names '.env', which is no file of a bundle"),
        (naming("sub/.git/config"), "names 'sub/.git/config'"),
        (naming("../outside.txt"), "names '../outside.txt'"),
        (linked, "names 'inside.txt'"),
        (lambda bundle: (bundle / "rlkit.json").unlink(), "has no rlkit.json, so it is no rlkit bundle"),
        (lambda bundle: (bundle / "rlkit.json").write_text("{}"), "lacks shape, target"),
        (lambda bundle: (bundle / "rlkit.json").write_text("{"), "is not valid JSON"),
    ],
)
def test_what_is_not_the_bundle_that_was_made_is_not_sent(
    hub: Hub, bundle: Path, change: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(bundle)
    assert push(bundle, REPO) == 2
    assert words in one_line(capsys)
    assert hub.tokens == set() and hub.files == {}


def test_absolute_names_are_refused(hub: Hub, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    naming(str(bundle.parent / "absolute.txt"))(bundle)
    assert push(bundle, REPO) == 2
    assert "which is no file of a bundle" in one_line(capsys)


@pytest.mark.parametrize("repo", ["plain", "a/b/c", "../x", "ann/", "ann/..x y"])
def test_names_that_are_none(hub: Hub, bundle: Path, repo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(bundle, repo) == 2
    assert "is no name of a hub repository" in one_line(capsys)
    assert card(bundle, "--push", repo) == 2


def test_without_a_token_nothing_is_asked(
    hub: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert push(bundle, REPO) == 1
    assert "no token for the hub: set HF_TOKEN" in one_line(capsys)
    assert hub.tokens == set()


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("/repos/create", 401, "does not accept this token"),
        ("/repos/create", 403, "this token may not write there"),
        ("/commit/", 403, "this token may not write there"),
        ("/repos/create", 404, "no such owner"),
        ("/repos/create", 500, "the hub answers 500"),
    ],
)
def test_refusals_are_one_line(
    hub: Hub, bundle: Path, where: str, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refusal = (where, status)
    assert push(bundle, REPO) == 1
    line = one_line(capsys)
    assert line.startswith(f"error: {REPO} was not pushed: ") and words in line and "hf_secret" not in line
    assert hub.files == {}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_refusal_of_a_large_file_is_told_in_the_hubs_words(
    hub: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.lfs_above, hub.refusal = 10_000, ("/objects/batch", 403)
    assert push(bundle, REPO) == 1
    assert "this token may not write there" in one_line(capsys)
    assert hub.files == {} and hub.commits == []


def test_a_hub_that_is_down(
    hub: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert push(bundle, REPO) == 1
    assert "check the connection and run it again" in one_line(capsys)


def test_a_card_is_written_again_and_its_hash_with_it(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (bundle / "README.md").read_text()
    edited_card(bundle)
    assert card(bundle) == 0
    assert capsys.readouterr().out == f"{bundle / 'README.md'}\n"
    assert (bundle / "README.md").read_text() == before
    assert publish.files_to_send(bundle, manifest(bundle))


def test_what_is_stated_is_kept(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert card(bundle, "--license", "Apache-2.0", "--base-model", "Qwen/Qwen3-4B", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["license"], found["base_model"]) == ("apache-2.0", "Qwen/Qwen3-4B")
    assert card(bundle) == 0
    text = (bundle / "README.md").read_text()
    assert 'license: "apache-2.0"\nbase_model: "Qwen/Qwen3-4B"\n' in text
    assert publish.files_to_send(bundle, manifest(bundle))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--license", "see README"], "is no identifier of the hub"),
        (["--base-model", "./model"], "is no hub id"),
    ],
)
def test_statements_that_the_hub_would_not_read(
    bundle: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in bundle.iterdir() if file.is_file()}
    assert card(bundle, *words) == 2
    assert said in one_line(capsys)
    assert {file.name: file.read_bytes() for file in bundle.iterdir() if file.is_file()} == before


def test_a_dry_run_shows_the_card_and_writes_nothing(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (bundle / "README.md").read_text()
    assert card(bundle, "--license", "mit", "--dry-run") == 0
    assert 'license: "mit"' in capsys.readouterr().out
    assert (bundle / "README.md").read_text() == before


def test_a_path_of_this_machine_is_pointed_out(hub: Hub, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = manifest(bundle)
    found["source"] = {"reference": "/home/ann/model", "kind": "hf", "file": "model"}
    (bundle / "rlkit.json").write_text(json.dumps(found))
    assert push(bundle, REPO, "--dry-run") == 0
    assert "note: rlkit.json says where the source lay on this machine, /home/ann/model" in capsys.readouterr().err
