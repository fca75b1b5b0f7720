"""Huge pages are asked for once, where the system wants to be asked, and nobody has decided otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlkit.runtime import hugepages

SHOW = "from rlkit.runtime import hugepages; hugepages.restart(); import os; print(os.environ.get('GLIBC_TUNABLES'))"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system that gives them to who asks."""
    monkeypatch.setattr(hugepages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never")
    return path


def test_the_environment_says_so_and_keeps_what_it_said(asked: Path) -> None:
    assert hugepages.variables({}, asked) == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    before = {"GLIBC_TUNABLES": "glibc.malloc.check=3"}
    assert hugepages.variables(before, asked) == {"GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    "environment",
    [
        {"RLKIT_HUGE_PAGES": "off"},
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"},
    ],
)
def test_what_somebody_decided_stays(asked: Path, environment: dict[str, str]) -> None:
    assert hugepages.variables(environment, asked) == {}


def test_where_they_are_given_anyway_or_never_nothing_is_asked(asked: Path) -> None:
    asked.write_text("[always] madvise never")
    assert hugepages.variables({}, asked) == {}
    assert hugepages.variables({}, asked.with_name("nowhere")) == {}


@pytest.mark.parametrize("switch", ["", "off"])
def test_a_command_starts_itself_once_more_and_not_twice(switch: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    words = [sys.executable, "-c", SHOW]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, timeout=60, env={**environment, "RLKIT_HUGE_PAGES": switch}
    )
    wanted = "glibc.malloc.hugetlb=1" if hugepages.must_be_asked_for() and switch != "off" else "None"
    assert done.stdout.split() == [wanted]
