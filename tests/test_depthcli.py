"""`rlkit depth` as a shell sees it: train, slim, export, eval and demo with tiny networks; interruptions; bad input."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkit.apps import cli, depthdemo, depthint8, depthscore, depthshow, depthsuite, depthwork
from rlkit.apps.depthdemo import Part
from rlkit.apps.depthscore import Held
from rlkit.apps.depthwork import DEFAULTS, FULL, INT8, SAME, Settings, Work
from rlkit.profiles import depthresult
from rlkit.profiles.depthmetrics import DepthScore, StereoScore
from rlkit.profiles.depthresult import Data, Row, Scored, Suite
from rlkit.recover import depthdata, depthfile, depthtrain, scenes
from rlkit.recover.anynet import AnyShape
from rlkit.recover.depthfile import Kind
from rlkit.recover.depthnets import DepthNet, DepthShape, value_count
from rlkit.recover.depthsample import DepthSample, StereoSample
from rlkit.recover.progress import Progress, silent
from rlkit.runtime import visionquant
from test_depthdata import diode, kitti, only, png

SHAPES: dict[Kind, Any] = {
    Kind.MONO: DepthShape.of(4, 6, 8),
    Kind.STEREO: AnyShape(spn=2, volume=((3,), (2,), (2,)), disparities=(3, 2, 2)),
}
TRAIN = {
    Kind.MONO: ("--steps", "4", "--size", "16x32", "--pool", "4", "--batch", "2"),
    Kind.STEREO: ("--steps", "2", "--size", "32x64", "--pool", "2", "--batch", "1"),
}
SLIM = ("--steps", "3", "--count", "2", "--no-motorcycle", "--no-forecast", "--json")
CUTS = "level,prune:0.5"


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Tiny networks and frames; int8 in one way only, and never learned unless a test asks for it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(depthwork, "full_shape", lambda kind: SHAPES[kind].to_json())
        patched.setattr(depthint8, "TOLERANCE", dict.fromkeys(Kind, 1.0))
        patched.setattr(depthsuite.Asked.__init__, "__defaults__", _defaults())
        patched.setattr(visionquant.quantize_static, "__kwdefaults__", {"methods": ("minmax",), "keeps": ("ends",)})
        yield


def _defaults() -> tuple[Any, ...]:
    _frame, *others = depthsuite.Asked.__init__.__defaults__ or ()
    return ((32, 64), *others)


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `rlkit depth ...`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(["depth", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def parsed(*arguments: str | Path) -> Any:
    code, out, err = run(*arguments)
    assert code == 0, err
    assert err == ""
    return json.loads(out)


def refused(*arguments: str | Path) -> str:
    """The one line of a bad input."""
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and err.startswith("error: "), (code, out, err)
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def works(small: None, tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, tuple[Path, Any, Any]]:
    """A work folder of each kind, and what `train` and `slim` printed. Tests leave them as they are."""
    made = {}
    root = tmp_path_factory.mktemp("works")
    for kind, cuts in ((Kind.MONO, CUTS), (Kind.STEREO, "spn:0")):
        out = root / str(kind)
        trained = parsed("train", kind, "-o", out, *TRAIN[kind], "--json")
        more = ("--seconds", "0.01") if kind is Kind.MONO else ("--seconds", "0", "--no-int8")
        made[kind] = out, trained, parsed("slim", out, "--cuts", cuts, *more, *SLIM)
    return made


@pytest.fixture(scope="module")
def mono(works: dict[Kind, tuple[Path, Any, Any]]) -> Path:
    return works[Kind.MONO][0]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- train, slim, export, eval --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(Kind))
def test_train_and_slim_say_and_write_the_same(works: dict[Kind, tuple[Path, Any, Any]], kind: Kind) -> None:
    out, trained, slimmed = works[kind]
    assert trained["schema_version"] == 1 and trained["training"]["steps"] == int(TRAIN[kind][1])
    assert Path(trained["folder"]) == out / "networks" / "full"
    assert depthfile.read(out / "networks" / "full").made["settings"] == trained["settings"]
    assert json.loads((out / "depth.json").read_text()) == slimmed
    (suite,) = slimmed["suites"]
    names = [row["name"] for row in suite["rows"]]
    if kind is Kind.MONO:
        assert names == ["full", "same", "level", "prune:0.5", "full int8", "level int8", "prune:0.5 int8", "constant"]
    else:
        assert names == ["full", "same", "spn:0", "constant", "semi-global matching"]
    rows = {row["name"]: row for row in suite["rows"]}
    for row in suite["rows"]:
        assert [each["data"] for each in row["scores"] if each["stage"] is None] == ["scenes"]
        assert (row["parameters"] is None) == (row["name"] in ("constant", "semi-global matching"))
        timed = kind is Kind.MONO and row["parameters"] is not None
        assert [each["frames"] >= 5 for each in row["latency"]] == [True] * timed
    stages = [each["stage"] for each in rows["full"]["scores"]]
    assert stages == ([None] if kind is Kind.MONO else [1, 2, 3, None])
    for row in (row for name, row in rows.items() if name.endswith("int8")):
        assert row["precision"] == "int8" and row["how"].endswith("(QDQ, minmax, first and last convolutions in float)")
    assert list((out / "state").iterdir()) == []


@pytest.mark.parametrize("kind", list(Kind))
def test_pictures_are_beside_the_page_and_in_it(works: dict[Kind, tuple[Path, Any, Any]], kind: Kind) -> None:
    out, _, slimmed = works[kind]
    page = (out / "report.html").read_text(encoding="utf-8")
    ((data, shown),) = slimmed["suites"][0]["pictures"].items()
    assert data == "scenes" and shown[0] == "full" and len(shown) >= 2
    for name in ("image", "truth", *shown, *(f"{each} error" for each in shown)):
        assert f"<figcaption>{name}</figcaption>" in page
        stem = name.replace(":", "-").replace(" ", "-").replace(".", "-")
        assert (out / "pictures" / f"{kind}-scenes-{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "pictures").iterdir())) == 2 + 2 * len(shown)
    result = depthresult.read(out)
    assert result.suites[0].pictures[0].predictions.keys() == set(shown)


def test_an_exported_file_is_measured_as_its_network(mono: Path, tmp_path: Path) -> None:
    file, network = tmp_path / "level.onnx", mono / "networks" / "level"
    asked = ("--count", "2", "--no-motorcycle", "--json")
    code, out, err = run("export", network, "-o", file)
    assert code == 0 and out == "" and f"file: {file}" in err and f"next: rlkit depth eval {file}" in err
    assert "exists already" in refused("export", network, "-o", file)
    assert run("export", network, "-o", file, "--force", "--size", "32x48")[0] == 0
    assert run("export", network, "-o", file, "--force")[0] == 0
    file_rows, rows = (
        {row["name"]: row for row in parsed("eval", which, *asked)["suites"][0]["rows"]} for which in (file, network)
    )
    assert list(file_rows) == ["level.onnx", "constant"] and list(rows) == ["level", "constant"]
    assert file_rows["constant"] == rows["constant"]
    assert rows["level"]["parameters"] == value_count(DepthNet(DepthShape.of(4, 6))) and rows["level"]["flops"] > 0
    assert file_rows["level.onnx"]["parameters"] is None  # it may be a part of a network
    figures, wanted = (each["scores"][0]["score"] for each in (file_rows["level.onnx"], rows["level"]))
    assert figures == pytest.approx(wanted, abs=1e-4)
    slimmed = json.loads((mono / "depth.json").read_text())["suites"][0]["rows"]
    assert next(row for row in slimmed if row["name"] == "level")["scores"][0]["score"] == pytest.approx(wanted)
    assert next(row for row in slimmed if row["name"] == "constant")["scores"] == rows["constant"]["scores"]


def test_eval_writes_a_folder_and_shows_a_table(mono: Path, tmp_path: Path) -> None:
    images = diode(tmp_path / "diode")
    asked = ("eval", mono / "networks" / "full", "--count", "1", "--no-motorcycle", "--data", images)
    code, out, err = run(*asked, "-o", tmp_path / "out")
    assert code == 0 and f"page: {tmp_path / 'out' / 'report.html'}" in err
    for words in ("full", "constant", "parameters", "diode: "):
        assert words in out
    assert "lost %" not in out.split("SSIM of log depth")[0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "depth.json", "pictures", "pictures.safetensors", "report.html"
    }  # fmt: skip
    suite = json.loads((tmp_path / "out" / "depth.json").read_text())["suites"][0]
    assert [(each["name"], each["samples"]) for each in suite["data"]] == [("scenes", 1), ("diode", 1)]
    assert "exists already; choose another -o" in refused(*asked, "-o", tmp_path / "out")


def test_slim_keeps_what_is_there_and_adds_other_cuts(mono: Path, tmp_path: Path) -> None:
    work = copied(mono, tmp_path)
    before = everything(work / "networks")
    (work / "pictures" / "mono-old-image.png").write_bytes(b"of an earlier run")
    (work / "pictures" / "mine.png").write_bytes(b"mine")
    result = parsed("slim", work, "--cuts", " widths:0.5 ,level,level", "--seconds", "0", "--no-int8", *SLIM)
    after = everything(work / "networks")
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after if name not in before} == {"widths-0.5"}
    assert [row["name"] for row in result["suites"][0]["rows"]] == ["full", "same", "widths:0.5", "level", "constant"]
    assert result["suites"][0]["rows"][0]["latency"] == []
    assert not (work / "pictures" / "mono-old-image.png").exists() and (work / "pictures" / "mine.png").exists()


def copied(work: Path, folder: Path) -> Path:
    for name, data in everything(work).items():
        (folder / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "work" / name).write_bytes(data)
    return folder / "work"


def test_an_interrupted_slim_goes_on_and_ends_as_it_would_have(
    mono: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "w"
    assert run("train", "mono", "-o", work, *TRAIN[Kind.MONO])[0] == 0
    planned = depthwork.training_of
    monkeypatch.setattr(depthwork, "training_of", lambda *a, **k: replace(planned(*a, **k), save_every=1))
    step, taken = depthtrain._Run.step, []

    def until(last: int) -> Any:
        def one(self: Any, index: int) -> float:
            if len(taken) == last:
                raise KeyboardInterrupt
            taken.append(index)
            return step(self, index)

        return one

    asked = ("slim", work, "--cuts", CUTS, "--seconds", "0", "--no-int8", *SLIM)
    for last in (2, 4):  # within `same`, then within `level`
        with monkeypatch.context() as patched:
            patched.setattr(depthtrain._Run, "step", until(last))
            code, out, err = run(*asked)
        assert code == 130 and out == "" and "interrupted; finished steps are kept" in err
        assert not (work / "depth.json").exists()
    assert sorted(path.name for path in (work / "networks").iterdir()) == ["full", "same"]
    assert [path.name for path in (work / "state").iterdir()] == ["level.safetensors"]
    parsed(*asked)
    assert taken == [0, 1, 2, 0]  # the rest was not patched
    for name in ("full", "same", "level", "prune-0.5"):
        (one,), (other,) = ([depthfile.load(each / "networks" / name)[0].state_dict()] for each in (work, mono))
        assert all(bool((one[key] == other[key]).all()) for key in other)


def test_a_folder_made_with_other_settings_is_refused_and_says_which(mono: Path) -> None:
    before = everything(mono)
    said = refused("train", "mono", "-o", mono, *TRAIN[Kind.MONO], "--seed", "3")
    assert "networks/full was made with other settings (seed 0, not 3); give those, remove it, or choose" in said
    assert "kind mono, not stereo" in refused("train", "stereo", "-o", mono)
    said = refused("slim", mono, "--cuts", "level", "--steps", "9", "--no-motorcycle")
    assert "networks/same was made with other settings (slim_steps 3, not 9)" in said
    assert run("train", "mono", "-o", mono, *TRAIN[Kind.MONO]) == (
        0,
        "",
        f"network: {mono / 'networks' / 'full'}\nnext: rlkit depth slim {mono}\n",
    )
    assert everything(mono) == before


def test_files_of_a_network_that_was_removed_go_with_the_next_one(mono: Path, tmp_path: Path) -> None:
    work = copied(mono, tmp_path)
    assert len(list((work / "onnx").glob("level*"))) == 3
    for path in (work / "networks" / "level").iterdir():
        path.unlink()
    (work / "networks" / "level").rmdir()
    depthshow.work_of(work).slim("level", silent)
    assert list((work / "onnx").glob("level*")) == []


# --- int8 -----------------------------------------------------------------------------------------------------------


def test_int8_that_loses_is_learned_and_the_better_file_kept(
    mono: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(mono, tmp_path)
    work = Work(copy, depthwork.settings_of(depthfile.read(copy / "networks" / "full"), steps=3))
    file = work.onnx("level", INT8)
    plain = file.read_bytes()
    told: list[Progress] = []
    assert depthint8.make(work, "level", told.append).steps == 0 and told == []  # what is there stays
    file.unlink()
    monkeypatch.setattr(depthint8, "TOLERANCE", dict.fromkeys(Kind, -9.0))
    planned = depthint8.training_of
    monkeypatch.setattr(depthint8, "training_of", lambda *a, **k: replace(planned(*a, **k), save_every=1))

    def interrupt(event: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        depthint8.make(work, "level", interrupt)
    assert not file.exists() and work.state(f"level{INT8}").is_file()
    made = depthint8.make(work, "level", told.append)
    assert [(event.stage, event.done, event.total) for event in told] == [("int8 level", 2, 2)]  # the first was kept
    assert not work.state(f"level{INT8}").exists()
    assert made == depthint8.make(work, "level", silent)
    if made.steps:
        assert made.lost < made.lost_at_once and file.read_bytes() != plain
        assert made.how.endswith("after 2 steps with simulated int8")
    else:
        assert made.lost == made.lost_at_once and file.read_bytes() == plain
    file.with_suffix(".json").write_text('{"schema_version": 1, "wings": 2}')
    with pytest.raises(ValueError, match="does not say how int8 was made; remove it"):
        depthint8.make(work, "level", silent)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of data that cannot be used."""
    root = tmp_path_factory.mktemp("bad")
    (root / "junk").mkdir()
    kitti(root / "kitti"), diode(root / "diode")
    shown = depthdata.load(depthdata.find(root / "kitti")[0])
    assert isinstance(shown, StereoSample)
    png(only(kitti(root / "sizes"), "image_3/000000_10.png"), shown.right[:, :-8])
    only(kitti(root / "missing"), "disp_occ_0/000000_10.png").unlink()
    scene = scenes.stereo(2, 0, 1, scenes.View(192, 256, max_disparity=32.0))
    tilted = root / "unrectified" / "training"
    png(tilted / "image_2" / "000000_10.png", scene.left[0])
    png(tilted / "image_3" / "000000_10.png", np.roll(scene.right[0], 6, 0))
    png(tilted / "disp_occ_0" / "000000_10.png", np.rint(scene.disparity[0] * 256).astype(np.uint16))
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        for path in diode(root / name).rglob("*_depth.npy"):
            np.save(path, np.full_like(np.load(path), value))
    for path in diode(root / "tiny").rglob("*.png"):
        png(path, shown.left[:3, :3])
        for part in ("depth", "depth_mask"):
            np.save(path.with_name(f"{path.stem}_{part}.npy"), np.ones((3, 3)))
    for path in kitti(root / "small").rglob("*.png"):
        values = (shown.disparity[:12, :12] * 256).astype(np.uint16) if "disp" in str(path) else shown.left[:12, :12]
        png(path, values)
    return root


@pytest.mark.parametrize(
    ("kind", "data", "why"),
    [
        (Kind.MONO, "junk", "is laid out as none of KITTI"),
        (Kind.MONO, "nowhere", "there is no folder"),
        (Kind.MONO, "kitti", "give a folder of single images with depth (DIODE)"),
        (Kind.STEREO, "diode", "give a folder of pairs (KITTI, SceneFlow)"),
        (Kind.STEREO, "sizes", "the left image is 64x48, the right one 56x48"),
        (Kind.STEREO, "missing", "has no disparity"),
        (Kind.STEREO, "unrectified", "the pair is not rectified"),
        (Kind.MONO, "nan", "no pixel has a finite depth above 0"),
        (Kind.MONO, "infinite", "no pixel has a finite depth above 0"),
        (Kind.MONO, "tiny", "3x3 are smaller than the network's stride of 4"),
        (Kind.STEREO, "small", "12x12 are smaller than the network's stride of 16"),
    ],
)
def test_data_that_cannot_be_measured_on_is_one_line(
    works: dict[Kind, tuple[Path, Any, Any]], bad: Path, kind: Kind, data: str, why: str
) -> None:
    network = works[kind][0] / "networks" / "full"
    assert why in refused("eval", network, "--no-motorcycle", "--count", "1", "--data", bad / data)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("train", "mono", "--size", "16"), "size '16' is none of an image; write HEIGHTxWIDTH"),
        (("train", "mono", "--size", "0x16"), "size '0x16' is none"),
        (("train", "mono", "--size", "-16x16"), "size '-16x16' is none"),
        (("train", "mono", "--size", "18x18"), "does not fit a network of stride 4"),
        (("train", "mono", "--size", "8x8", "--pool", "1"), "smaller than SSIM's window of 11"),
        (("train", "stereo", "--size", "24x64"), "does not fit a network of stride 16"),
        (("train", "mono", "--rate", "0"), "rate = 0.0"),
        (("train", "mono", "--rate", "nan"), "rate = nan"),
        (("train", "mono", "--seed", "2147483647"), "use a seed from 0 to 2147483646"),
        (("train", "mono", "--data", "BAD/kitti"), "has pairs without depth in metres; use DIODE"),
        (("train", "stereo", "--data", "BAD/diode"), "has single images, and a stereo network needs pairs"),
        (("train", "stereo", "--data", "BAD/unrectified", "--size", "64x64"), "the pair is not rectified"),
        (("train", "mono", "--data", "BAD/nan", "--size", "16x16"), "no pixel has a finite depth above 0"),
        (("train", "mono", "--data", "BAD/diode", "--size", "64x64"), "64x48 is smaller than the cut of 64x64"),
        (("train", "sound",), "'sound' is not one of 'mono', 'stereo'"),
    ],
)  # fmt: skip
def test_trainings_that_cannot_be_are_one_line(bad: Path, tmp_path: Path, arguments: tuple[str, ...], why: str) -> None:
    given = [each.replace("BAD", str(bad)) for each in arguments]
    assert why in refused(*given, "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "networks").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("slim", "MONO", "--cuts", "half"), "'half' is no cut; write level"),
        (("slim", "MONO", "--cuts", "spn:4"), "'spn:4': spn is no cut for a mono network; use level, widths:0.497"),
        (("slim", "STEREO", "--cuts", "spn:0+level"), "level is no cut for a stereo network; use spn:4"),
        (("slim", "MONO", "--lesson", "x"), "lesson 'x' is none; use one of truth, teacher, both"),
        (("slim", "BAD/junk"), "has no network.json, so it is no depth network; see rlkit depth train"),
        (("slim", "MONO", "--cuts", "prune:0.01", "--steps", "3"), "are the fewest that pruning leaves"),
        (("eval", "MONO"), "give one of its networks, such as"),
        (("eval", "nothing.onnx"), "no file nothing.onnx; make one with rlkit depth export"),
        (("export", "MONO/networks/full", "-o", "x.onnx", "--size", "14x16"), "does not fit a stride of 4"),
        (("export", "MONO/networks/full", "-o", "x.onnx", "--stage", "1"), "only networks of pairs have stages"),
        (("export", "STEREO/networks/spn-0", "-o", "x.onnx", "--stage", "4"), "stage 4 is none"),
        (("export", "STEREO/networks/full", "-o", "x.onnx", "--unroll"), "give a size, or keep the loop"),
        (("demo", "-o", "MONO"), "exists and is not a depth demo's folder"),
        (("demo", "-o", "MONO", "--fresh"), "exists and is not a depth demo's folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_with_a_work_folder_is_one_line(
    works: dict[Kind, tuple[Path, Any, Any]], bad: Path, tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    places = {"BAD": bad, "MONO": works[Kind.MONO][0], "STEREO": works[Kind.STEREO][0]}
    before = everything(places["MONO"])
    given = list(arguments)
    for name, place in places.items():
        given = [each.replace(name, str(place)) for each in given]
    given = [str(tmp_path / each) if each == "x.onnx" else each for each in given]
    assert why in refused(*given)
    assert everything(places["MONO"]) == before and list(tmp_path.iterdir()) == []


# --- figures --------------------------------------------------------------------------------------------------------


def suite_of(kind: Kind, figures: dict[str, tuple[float, int | None]]) -> Suite:
    """Rows by name: the leading figure on one data set, and parameters (None for a baseline)."""

    def scored(value: float) -> tuple[Scored, ...]:
        score = DepthScore(0.1, 0.9, 0.5, value, 9) if kind is Kind.MONO else StereoScore(value, 1.0, 9)
        return (Scored("scenes", score),)

    rows = [Row(name, "", scored(value), count, 1, 1) for name, (value, count) in figures.items()]
    return Suite(kind, 8, 8, (Data("scenes", "", 1),), tuple(rows))


def test_losses_are_counted_against_the_better_full_network() -> None:
    networks = {FULL: (0.5, 100), SAME: (0.8, 100), "small": (0.79, 20), "large": (0.81, 60)}
    suite = suite_of(Kind.MONO, {**networks, "constant": (0.3, None)})
    assert depthsuite.reference(suite).name == SAME
    assert depthsuite.loss(suite, suite.row("small")) == pytest.approx(1 - 0.79 / 0.8)
    (bar,) = depthsuite.bars(suite)
    assert bar.met and bar.found == pytest.approx(0.0125) and "(small)" in bar.claim and "75% fewer" in bar.claim
    pairs = suite_of(Kind.STEREO, {FULL: (0.2, 100), SAME: (0.1, 100), "small": (0.14, 70), "constant": (0.9, None)})
    assert depthsuite.reference(pairs).name == SAME
    (bar,) = depthsuite.bars(pairs)
    assert not bar.met and bar.found == pytest.approx(0.04)


def test_where_a_constant_is_as_good_nothing_is_claimed() -> None:
    suite = suite_of(Kind.MONO, {FULL: (0.5, 100), "small": (0.5, 20), "constant": (0.6, None)})
    assert depthsuite.bars(suite) == []
    negative = suite_of(Kind.MONO, {FULL: (-0.2, 100), "small": (-0.1, 20), "constant": (-0.3, None)})
    assert depthsuite.loss(negative, negative.row("small")) is None and depthsuite.bars(negative) == []
    depthshow.show(negative)


def test_groups_of_several_sizes_count_by_their_pixels() -> None:
    truth, image = np.full((16, 32), 2, np.float32), np.zeros((16, 32, 3), np.uint8)
    samples = [
        DepthSample(str(size), image[:, :size], truth[:, :size], np.ones((16, size), bool)) for size in (32, 16, 32)
    ]
    held = depthscore.held_samples("x", samples, (16, 16))
    assert [group.image.shape for group in held.groups] == [(2, 16, 32, 3), (1, 16, 16, 3)]
    assert isinstance(held, Held) and held.data == Data("x", "samples at hand", 3, held_out=False)
    scale = depthfile.LogScale()

    def predict(images: Any) -> list[Any]:
        return [np.full(images.shape[:-1], 2.0 if images.shape[2] == 32 else 4.0, np.float32)]

    (found,) = depthscore.scores([held], predict, scale)
    assert isinstance(found.score, DepthScore) and found.score.pixels == 5 * 256
    assert found.score.abs_rel == pytest.approx(1 / 5) and found.score.rmse_m == pytest.approx(np.sqrt(4 / 5))
    assert found.score.delta_1_25 == pytest.approx(4 / 5)


# --- demo -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of moments, with a scene instead of the Motorcycle."""
    settings = {
        Kind.MONO: Settings(Kind.MONO, (16, 32), 2, 2, 1, 1e-3, 1e-3, 2),
        Kind.STEREO: Settings(Kind.STEREO, (32, 64), 1, 1, 1, 1e-3, 1e-3, 1),
    }
    cuts = {Kind.MONO: ("level",), Kind.STEREO: ("spn:0",)}
    monkeypatch.setattr(depthdemo, "PARTS", {kind: Part(settings[kind], cuts[kind]) for kind in Kind})
    monkeypatch.setattr(depthdemo, "HELD_OUT", 1)
    monkeypatch.setattr(depthdemo, "TIMED_SECONDS", 0.01)
    pair = scenes.stereo(9, 0, 1, scenes.View(48, 64, max_disparity=16.0))
    real = StereoSample("motorcycle", pair.left[0], pair.right[0], pair.disparity[0], pair.valid[0], None, pair.camera)
    monkeypatch.setattr(depthdata, "motorcycle", lambda _tell=silent: real)


def test_the_demo_makes_measures_and_tells(brief: None, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    steps = parsed("demo", "-o", out, "--dry-run", "--json")["steps"]
    assert [each["step"] for each in steps] == [
        "mono: full", "mono: same", "mono: level", "stereo: full", "stereo: same", "stereo: spn:0"
    ] and {each["state"] for each in steps} == {"to do"} and not out.exists()  # fmt: skip
    code, said, told = run("demo", "-o", out)
    assert code == 0
    for words in ("train full: 100%", f"page: {out / 'report.html'}", f"pictures: {out / 'pictures'}", " in all"):
        assert words in told
    advice = told.splitlines()[-1].removeprefix("next: rlkit depth ").replace("prune:0.05", "level").split()
    short = ("--count", "1", "--no-motorcycle", "--seconds", "0", "--no-forecast", "--no-int8", "--json")
    assert parsed(*advice, *short)["suites"][0]["rows"][2]["name"] == "prune:0.25:0.4"
    for words in ("level int8", "constant", "semi-global matching", "motorcycle: Middlebury", "scenes: rendered"):
        assert words in said
    result = json.loads((out / "depth.json").read_text())
    assert [suite["kind"] for suite in result["suites"]] == ["mono", "stereo"]
    assert len(list((out / "pictures").glob("*.png"))) == sum(
        2 + 2 * len(shown) for suite in result["suites"] for shown in suite["pictures"].values()
    )
    before = everything(out / "mono" / "networks")
    steps = parsed("demo", "-o", out, "--dry-run", "--json")["steps"]
    assert {each["state"] for each in steps} == {"done before"}
    assert "done before" in run("demo", "-o", out, "--dry-run")[1]
    assert everything(out / "mono" / "networks") == before


def test_fresh_empties_only_an_own_folder(brief: None, tmp_path: Path) -> None:
    depthdemo._prepare(tmp_path / "own", fresh=False)
    (tmp_path / "own" / "mono").mkdir()
    depthdemo._prepare(tmp_path / "own", fresh=False)
    assert (tmp_path / "own" / "mono").is_dir()
    depthdemo._prepare(tmp_path / "own", fresh=True)
    assert [path.name for path in (tmp_path / "own").iterdir()] == [depthdemo.MARK]


def test_defaults_are_of_the_published_networks() -> None:
    assert set(DEFAULTS) == set(depthwork.CUTS) == set(Kind)
    for kind in Kind:
        depthshow.check_cuts(kind, depthwork.CUTS[kind])
        assert all(side % 16 == 0 for side in DEFAULTS[kind].size)
