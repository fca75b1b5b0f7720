"""Bundles opened on demand within a bound of memory, and the command that serves them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

import served
import tiny
from rlkit.apps import cli, serve
from rlkit.apps.server import page
from rlkit.apps.server.pool import Pool
from rlkit.apps.server.refusals import Refusal
from rlkit.apps.server.settings import Settings
from rlkit.export.build import export_bundle
from served import Scripted


def three(root: Path, **options: Any) -> list[Scripted]:
    return [Scripted(served.folder_of(root, name, nbytes=100), nbytes=100, **options) for name in "abc"]


def use(pool: Pool, name: str) -> None:
    pool.give_back(pool.open(name))


def names(pool: Pool) -> list[str]:
    return [loaded.name for loaded in pool.loaded()]


def test_the_bundle_used_longest_ago_goes(tmp_path: Path) -> None:
    sessions = three(tmp_path)
    pool = served.pool_of(*sessions, memory_nbytes=250)
    use(pool, "a")
    use(pool, "b")
    use(pool, "a")
    assert names(pool) == ["b", "a"]
    use(pool, "c")
    assert names(pool) == ["a", "c"]
    assert [session.closed for session in sessions] == [False, True, False]
    use(pool, "b")
    assert names(pool) == ["c", "b"]
    pool.close()
    assert all(session.closed for session in sessions)
    with pytest.raises(Refusal, match="the server is ending"):
        pool.open("a")


def test_a_bundle_in_use_stays(tmp_path: Path) -> None:
    sessions = three(tmp_path)
    pool = served.pool_of(*sessions, memory_nbytes=250)
    first, second = pool.open("a"), pool.open("b")
    with pytest.raises(Refusal, match=r"model c needs 0\.00 GB, and what is loaded is in use") as caught:
        pool.open("c")
    assert caught.value.status == 429 and int(caught.value.headers["retry-after"]) >= 1
    assert names(pool) == ["a", "b"]
    pool.give_back(second)
    use(pool, "c")
    assert names(pool) == ["a", "c"]
    assert not sessions[0].closed and sessions[1].closed
    pool.give_back(first)
    pool.close()


def test_one_bundle_is_opened_once_for_many(tmp_path: Path) -> None:
    session = Scripted(served.folder_of(tmp_path, "a"))
    opened: list[Path] = []
    inner = served.pool_of(session)

    def open_one(folder: Path) -> Any:
        opened.append(folder)
        return inner._open(folder)

    pool = Pool({"a": session.folder}, open_one)
    threads = [threading.Thread(target=use, args=(pool, "a")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [session.folder]
    assert pool.loaded()[0].users == 0
    pool.close()


def test_a_bundle_beyond_the_bound_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a takes 0\.00 GB, more than the 0.00 GB there are for all"):
        served.pool_of(*three(tmp_path), memory_nbytes=99)


def test_a_bundle_that_breaks_later_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    sessions = three(tmp_path)
    known = served.pool_of(*sessions)

    def open_one(folder: Path) -> Any:
        if folder.name == "b":
            raise ValueError(f"{folder} cannot be opened: its files are damaged")
        return known._open(folder)

    pool = Pool({session.folder.name: session.folder for session in sessions}, open_one)
    with served.serving(pool) as address:
        broken = httpx.post(f"{address}/v1/completions", json={"model": "b", "prompt": "x"})
        assert broken.status_code == 503
        error = broken.json()["error"]
        assert error["message"] == "model b cannot be opened: b cannot be opened: its files are damaged"
        assert error["code"] == "model_unavailable"
        for name in ("a", "c"):
            fine = httpx.post(f"{address}/v1/completions", json={"model": name, "prompt": "x"})
            assert (fine.status_code, fine.json()["model"]) == (200, name)
        rows = httpx.get(f"{address}/rlkit/stats").json()["models"]
        assert [row["loaded"] for row in rows] == [True, False, True]


def test_adapters_are_models(tmp_path: Path) -> None:
    session = Scripted(served.folder_of(tmp_path, "m"))
    (session.folder / "adapters" / "poem.onnx_adapter").write_bytes(b"")
    with served.serving(served.pool_of(session)) as address, served.client_of(address) as client:
        assert [model.id for model in client.models.list()] == ["m", "m:poem"]
        assert client.models.retrieve("m:poem").to_dict()["parent"] == "m"
        reply = client.completions.create(model="m:poem", prompt="x")
        assert reply.model == "m:poem"
        client.completions.create(model="m", prompt="x")
        assert [request.adapter for request in session.asked] == ["poem", None]
        assert httpx.get(f"{address}/rlkit/profile/m:poem").json()["adapter"] == "poem"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"api_key": ""}, "API key"),
        ({"api_key": " k"}, "API key"),
        ({"api_key": "schlüssel"}, "API key"),
        ({"cors": ("example.org",)}, "is no origin"),
        ({"cors": ("https://example.org/",)}, "is no origin"),
    ],
)
def test_settings_that_are_none(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**values)


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("box.lan", False)]
)
def test_loopback(host: str, own: bool) -> None:
    assert Settings(host).loopback is own


def test_a_server_for_other_machines_takes_any_host(tmp_path: Path) -> None:
    session = Scripted(served.folder_of(tmp_path, "m"))
    with served.serving(served.pool_of(session), Settings("0.0.0.0")) as address:
        assert httpx.get(f"{address}/health", headers={"host": "box.lan"}).status_code == 200


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    checkpoint = tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt", tiny.W4)
    return export_bundle(checkpoint, root / "tiny", accuracy_level=0)


def test_the_command_says_where_it_listens_and_ends_on_a_signal(bundle: Path) -> None:
    command = [sys.executable, "-m", "rlkit.apps.cli", "serve", str(bundle), "--port", "0", "--json"]
    command += ["--device", "auto"]
    settings = {**os.environ, "RLKIT_API_KEY": "k", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings) as process:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        assert line["schema_version"] == 1 and line["models"] == ["tiny"]
        assert httpx.get(f"{line['address']}/v1/models").status_code == 401
        with served.client_of(line["address"], "k") as client:
            reply = client.completions.create(model="tiny", prompt="the cat", max_tokens=3)
            assert reply.usage is not None and reply.usage.completion_tokens <= 3
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=served.WAIT_SECONDS)
    assert process.returncode == 0
    assert out == ""
    assert f"listening at {line['address']}" in said and "models: tiny" in said and "Traceback" not in said
    assert "tiny on cpu: the processor: " in said  # what auto took, and why


def test_a_port_in_use(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.run(["serve", str(bundle), "--port", port]) == 2
    said = capsys.readouterr().err
    assert f"cannot listen at 127.0.0.1 port {port}" in said and "--port" in said


def test_bundles_that_cannot_be_served(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer = served.folder_of(tmp_path, "newer")
    for name in ("genai_config.json", "tokenizer.json", "model.onnx"):
        (newer / name).write_bytes((bundle / name).read_bytes())
    (newer / "rlkit.json").write_text('{"schema_version": 99}')
    twin = tmp_path / "x" / "tiny"
    twin.parent.mkdir()
    twin.symlink_to(bundle)
    cases = [
        ([str(newer)], "schema_version 99"),
        ([str(tmp_path / "none")], "none"),
        ([str(bundle), str(tmp_path / "x" / "again" / ".." / "tiny")], "same name tiny"),
        ([str(bundle), "--memory", "0.00001"], "raise --memory"),
        ([str(bundle), "--memory", "-1"], "--memory -1.0 GB"),
        ([str(bundle), "--host", "256.0.0.1.example.invalid"], "is no address"),
        ([str(bundle), "--cors", "example.org"], "is no origin"),
    ]
    (tmp_path / "x" / "again").mkdir()
    for arguments, words in cases:
        assert cli.run(["serve", *arguments, "--port", "0"]) == 2, arguments
        said = capsys.readouterr().err
        assert words in said, said
        assert "Traceback" not in said


def test_a_page_that_is_not_installed() -> None:
    with pytest.raises(Refusal, match=r"the page has no file 'index\.html'") as caught:
        page.answer({}, page.INDEX)
    assert caught.value.status == 404


def test_the_server_needs_no_torch() -> None:
    program = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import rlkit.apps.serve, rlkit.apps.server.app
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_memory_by_default_is_a_share_of_what_there_is() -> None:
    assert serve._memory_nbytes(2.5) == 2_500_000_000
    assert serve._memory_nbytes(None) > 0
