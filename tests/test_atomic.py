from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rlkit.recover import atomic


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_only_when_complete(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "out"
    with atomic.fresh_folder(place) as work:
        (work / "file").write_text("x")
        assert not place.exists()
        assert work.parent == place.parent  # same disk, so the rename is one step
    assert (place / "file").read_text() == "x"
    assert left_over(place.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic.fresh_folder(tmp_path / "out") as work:
        (work / "file").write_text("half")
        raise error
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_replacement_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    place = tmp_path / "out"
    place.mkdir()
    (place / "old").write_text("old")
    with pytest.raises(error), atomic.fresh_folder(place, force=True) as work:
        (work / "new").write_text("half")
        raise error
    assert left_over(tmp_path) == ["out"]
    assert left_over(place) == ["old"]


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    (place / "old").write_text("old")
    with atomic.fresh_folder(place, force=True) as work:
        (work / "new").write_text("new")
        assert left_over(place) == ["old"]  # stays until the new one is complete
    assert left_over(place) == ["new"]
    assert left_over(tmp_path) == ["out"]


def test_force_replaces_a_file_by_a_folder(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.write_text("a file")
    with atomic.fresh_folder(place, force=True) as work:
        (work / "new").write_text("new")
    assert left_over(place) == ["new"]


def test_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already; pass --force"), atomic.fresh_folder(tmp_path / "out"):
        pytest.fail("the body must not run")
    assert left_over(tmp_path) == ["out"]


def test_a_killed_process_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from rlkit.recover import atomic
with atomic.fresh_folder(Path({str(tmp_path / "out")!r})) as work:
    (work / "file").write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 9
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_made_folders_and_files_have_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("x")
    with atomic.fresh_folder(tmp_path / "out") as work:
        atomic.write_text(work / "file", "x")
    for name in ("", "file"):
        made, usual = (tmp_path / folder / name for folder in ("out", "plain"))
        assert stat.S_IMODE(made.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    atomic.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert left_over(tmp_path) == ["value.json"]


def test_an_error_while_renaming_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OSError):
        atomic.write_text(tmp_path / "taken", "x")
    assert left_over(tmp_path) == ["taken"]


def test_text_is_utf8(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "deep" / "a.txt", "größer\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "größer\n".encode()


def test_too_little_space_is_said_before_writing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="free some space or choose another folder") as caught:
        atomic.need_space(tmp_path / "not" / "there" / "yet", 1 << 62)
    assert caught.value.errno == errno.ENOSPC
    atomic.need_space(tmp_path, 1)
    assert left_over(tmp_path) == []


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert atomic.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
