from __future__ import annotations

import errno
from pathlib import Path

import pytest

from rlkit.apps import errors
from rlkit.apps.errors import ExitCode
from rlkit.recover.assets import DownloadError


def raised(function: object) -> BaseException:
    assert callable(function)
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (ValueError("bits = 3 is not offered; use 2"), "error: bits = 3 is not offered; use 2", ExitCode.BAD_INPUT),
        (
            FileExistsError("out exists already; pass --force"),
            "error: out exists already; pass --force",
            ExitCode.BAD_INPUT,
        ),
        (raised(Path("no/such/file").read_text), "error: no/such/file: No such file or directory", ExitCode.BAD_INPUT),
        (raised(Path("/").read_text), "error: /: Is a directory", ExitCode.BAD_INPUT),
        (OSError(errno.ENOSPC, "disk full; free 3 MB"), "error: disk full; free 3 MB", ExitCode.FAILED),
        (
            PermissionError(errno.EACCES, "Permission denied", "/root/x"),
            "error: /root/x: Permission denied",
            ExitCode.FAILED,
        ),
        (DownloadError("no connection; run it again"), "error: no connection; run it again", ExitCode.FAILED),
        (ValueError("two\n  lines"), "error: two lines", ExitCode.BAD_INPUT),
        (MemoryError(), "error: out of memory; close other programs", ExitCode.FAILED),
        (KeyboardInterrupt(), "interrupted; finished steps are kept", ExitCode.INTERRUPTED),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            'error: this needs torch, which is not installed; run: pip install "rlkit-edge[recover]"',
            ExitCode.FAILED,
        ),
        (
            ModuleNotFoundError("No module named 'onnx_ir.passes'", name="onnx_ir.passes"),
            'error: this needs onnx_ir.passes, which is not installed; run: pip install "rlkit-edge[export]"',
            ExitCode.FAILED,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_expected_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, line: str, code: ExitCode
) -> None:
    monkeypatch.delenv("RLKIT_DEBUG", raising=False)
    assert errors.report(error) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line) and err.count("\n") == 1


def test_an_error_made_of_an_interrupt_is_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    def imports() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    assert errors.report(raised(imports)) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err.startswith("interrupted")


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("boom"), ImportError("boom", name="rlkit.nix")])
def test_the_unexpected_shows_its_traceback(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    def fails() -> None:
        raise error

    assert errors.report(raised(fails)) == ExitCode.FAILED
    err = capsys.readouterr().err
    assert "Traceback" in err and "in fails" in err
    assert err.splitlines()[-1].startswith(f"error: unexpected {type(error).__name__}") and "boom" in err


def test_debug_shows_the_traceback_of_expected_ones_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RLKIT_DEBUG", "1")
    assert errors.report(raised((tmp_path / "none").read_text)) == ExitCode.BAD_INPUT
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: ")
