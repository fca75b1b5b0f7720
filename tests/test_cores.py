"""Processors this process may use: affinity, containers' quotas of both versions, and two threads of one core."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlkit.recover import cores


def topology(root: Path, *places: tuple[int, int]) -> Path:
    """A folder like /sys/devices/system/cpu: (package, core) of each logical processor."""
    for number, (package, core) in enumerate(places):
        folder = root / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
    return root


def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    cpus = topology(tmp_path, (0, 0), (0, 1), (0, 0), (0, 1), (1, 0))
    assert cores.one_per_core((0, 1, 2, 3, 4), cpus) == (0, 1, 4)
    assert cores.one_per_core((2, 3), cpus) == (2, 3)  # halves of two cores are two cores
    assert cores.one_per_core((0, 2), cpus) == (0,)


def test_where_the_system_does_not_say_neighbours_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cores.psutil, "cpu_count", lambda logical: 4)
    assert cores.one_per_core(tuple(range(8)), tmp_path) == (0, 2, 4, 6)
    assert cores.one_per_core((0, 1, 2), tmp_path) == (0, 1, 2)  # some of them: which belong together is unknown
    monkeypatch.setattr(cores.psutil, "cpu_count", lambda logical: None)
    assert cores.one_per_core(tuple(range(8)), tmp_path) == tuple(range(8))


def group(tmp_path: Path, own: str, **files: str) -> tuple[Path, Path]:
    """/proc/self/cgroup and /sys/fs/cgroup; "/" in a file's name is written as two underscores, "." as one."""
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "root" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cpu_cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "own", tmp_path / "root"


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/a/b\n", {"a__b__cpu_max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a__cpu_max": "200000 100000\n", "a__b__cpu_max": "max 100000\n"}, 2.0),
        ("0::/a\n", {"cpu_max": "50000 100000\n", "a__cpu_max": "400000 100000\n"}, 0.5),
        ("0::/a\n", {"a__cpu_max": "max 100000\n"}, None),
        ("0::/a\n", {"a__cpu_max": "nonsense\n"}, None),
        ("0::/../../a\n", {"a__cpu_max": "300000 100000\n"}, 3.0),
        ("3:x,cpu:/d\n", {"x,cpu__d__cpu_cfs_quota_us": "250000", "x,cpu__d__cpu_cfs_period_us": "100000"}, 2.5),
        ("3:cpu:/d\n", {"cpu__d__cpu_cfs_quota_us": "-1", "cpu__d__cpu_cfs_period_us": "100000"}, None),
        ("4:memory:/d\n", {"memory__d__cpu_cfs_quota_us": "1"}, None),
        ("", {}, None),
    ],
)  # fmt: skip
def test_quotas_of_containers(tmp_path: Path, own: str, files: dict[str, str], limit: float | None) -> None:
    assert cores.quota(*group(tmp_path, own, **files)) == limit


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cores.quota(tmp_path / "nothing", tmp_path) is None


@pytest.mark.parametrize(
    ("allowed", "physical", "quota", "threads"),
    [
        (8, 4, None, 4),
        (8, 8, None, 8),
        (2, 1, None, 2),  # both threads of the only core
        (1, 1, None, 1),
        (8, 8, 2.5, 2),
        (8, 8, 0.5, 1),
        (8, 8, 3.96, 4),
        (8, 4, 16.0, 4),
    ],
)
def test_default_threads(
    monkeypatch: pytest.MonkeyPatch, allowed: int, physical: int, quota: float | None, threads: int
) -> None:
    monkeypatch.setattr(cores, "allowed", lambda: tuple(range(allowed)))
    monkeypatch.setattr(cores, "one_per_core", lambda processors: processors[:physical])
    monkeypatch.setattr(cores, "quota", lambda: quota)
    assert cores.default_threads() == threads


def test_this_process_may_use_some() -> None:
    assert cores.allowed() and 1 <= cores.default_threads() <= len(cores.allowed())
    assert set(cores.one_per_core(cores.allowed())) <= set(cores.allowed())
