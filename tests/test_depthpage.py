"""The page of depth networks: what it says, pictures that are the maps they show, and that it needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkit.profiles import depthpage, depthpictures
from rlkit.profiles.depthmetrics import DepthScore, StereoScore
from rlkit.profiles.depthresult import Bar, Data, DepthResult, Latency, Picture, Row, Scored, Suite
from rlkit.recover.depthfile import Kind

EVIL = "<b>&\"'../x"


def mono(ssim: float | None) -> tuple[Scored, ...]:
    return (Scored("rooms", DepthScore(0.1, 0.9, 0.5, ssim, 100)),)


def stereo(*errors: float) -> tuple[Scored, ...]:
    """The answer's three-pixel error, then each stage's."""
    scores = [StereoScore(error, 10 * error, 100) for error in errors]
    return (Scored("pairs", scores[0]), *(Scored("pairs", each, 1 + at) for at, each in enumerate(scores[1:])))


def picture(name: str = "a room", width: int = 12, *, depth: bool = True) -> Picture:
    truth = np.linspace(1, 8, 6 * width, dtype=np.float32).reshape(6, width)
    valid = np.ones((6, width), bool)
    valid[0, 0] = False
    image = np.random.default_rng(0).integers(0, 256, (6, width, 3), dtype=np.uint8)
    return Picture(name, image, truth, valid, {"full": truth + (0.25 if depth else 2), EVIL: truth})


def result() -> DepthResult:
    timed = Latency("cpu", 1, 0.02, 0.019, 0.021, 30, 0.025)
    rows = (
        Row("full", "trained 10 steps", mono(0.9), 1_966_465, 10**9, 4 * 10**6, latency=(timed,)),
        Row(
            "small",
            "a level less",
            mono(0.88),
            489_089,
            10**8,
            10**6,
            latency=(Latency("cpu", 1, 0.01, 0.01, 0.01, 30),),
        ),
        Row(EVIL, "pruned", mono(0.87), 600_000, 2 * 10**8, 3 * 10**5, "int8"),
        Row("constant", "the mean of the training depths", mono(0.4)),
        Row("unscored", "no window is known", mono(None), 100, 100, 100),
    )
    bars = (Bar("75 % fewer at 2 % loss", 0.02, 0.0222, False), Bar("twice as fast", 2.0, 2.0, True))
    data = (Data("rooms", "rendered rooms", 24), Data("seen", "training rooms", 1, held_out=False))
    first = Suite(Kind.MONO, 64, 96, data, rows, bars, (picture(),))
    pairs = (
        Row("8", "as published", stereo(0.2, 0.5, 0.3, 0.25, 0.2), 43_269),
        Row("0", "no SPN", stereo(0.25), 34_629),
        Row("matching", "OpenCV", stereo(0.22)),
    )
    second = Suite(
        Kind.STEREO, 64, 96, (Data("pairs", "made", 3),), pairs, pictures=(picture("wide", 1500, depth=False),)
    )
    return DepthResult((first, second), ("rlkit depth demo", "a machine"))


@pytest.fixture(scope="module")
def page() -> str:
    return depthpage.to_html(result())


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_the_page_needs_nothing_else_and_is_the_same_again(page: str, tmp_path: Path) -> None:
    depthpage.write(tmp_path / "depth.html", result())
    assert (tmp_path / "depth.html").read_text(encoding="utf-8") == page
    reader = read(page)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in reader.tags}
    addresses = [value for _, found in reader.tags for key, value in found.items() if key in ("src", "href")]
    assert addresses and all(str(value).startswith("data:image/png;base64,") for value in addresses)
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert "<b>&" not in page  # names are text


def test_what_the_page_says(page: str) -> None:
    text = " ".join(read(page).text)
    for said in (
        "missed  75 % fewer at 2 % loss: 0.0222 found, 0.02 asked for",
        "met  twice as fast: 2 found, 2 asked for",
        "seen: training rooms, 1 image (not held out).",
        "a frame of 96x64",
        "a machine",
    ):
        assert said in text


def test_tables_hold_what_was_measured() -> None:
    first, second = result().suites
    rows = {row[0]: row for row in depthpage.accuracy(first).rows}
    assert rows["full"][1:6] == ("1,966,465", "", "1,000.0", "4,000.0", "float32")
    assert rows["small"][1:3] == ("489,089", "75.1") and rows[EVIL][5] == "int8"
    assert rows["constant"][1:6] == ("",) * 5 and rows["constant"][6] == "0.4000"
    assert rows["full"][6:10] == ("0.9000", "0.1000", "90.00", "0.500") and rows["full"][10:14] == ("",) * 4
    assert rows["unscored"][6] == ""
    times = depthpage.latencies(first).rows
    assert times[0] == ("full", "cpu, 1 thread", "20", "19 to 21", "25", "+25", "1.00x", "30")
    assert times[1][4:7] == ("", "", "2.00x")
    assert [row[1:3] for row in depthpage.stages(second).rows] == [
        ("1", "50.00"), ("2", "30.00"), ("3", "25.00"), ("4", "20.00")
    ]  # fmt: skip
    assert not depthpage.stages(first).rows and not depthpage.latencies(second).rows


def test_charts_join_the_frontier_and_dash_baselines(page: str) -> None:
    charts = re.findall(r"<svg class=\"chart\".*?</svg>", page)
    assert len(charts) == 3  # two of one image, over parameters and milliseconds; one of pairs
    parameters, milliseconds, pairs = charts
    assert parameters.count('class="mark c0"') == 2 and parameters.count('class="mark c1"') == 1
    assert 'class="even"' not in parameters and "↓ constant 0.4" in parameters  # it would flatten the rest
    assert milliseconds.count('class="mark c0"') == 2  # the smaller one is faster and less accurate: both are on it
    assert pairs.count("<polyline") == 1 and pairs.count('class="even"') == 1 and "matching 22" in pairs
    assert depthpage.to_html(DepthResult(())).count("<svg") == 0


# --- pictures -------------------------------------------------------------------------------------------------------


def decoded(data: bytes) -> np.ndarray[Any, Any]:
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(data)))


@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3), (1, 1, 4)])
def test_png_is_read_back_by_another(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(decoded(depthpictures.png(pixels)), pixels)


@pytest.mark.parametrize("bad", [np.zeros((2, 2, 2), np.uint8), np.zeros((0, 3), np.uint8), np.zeros((2, 2))])
def test_no_picture_is_said(bad: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ValueError, match="is no picture"):
        depthpictures.png(bad)


def test_truth_and_predictions_share_colours_and_errors_have_their_own() -> None:
    shown = {each.name: decoded(each.png) for each in depthpictures.drawn(Kind.STEREO, picture(depth=False))}
    assert list(shown) == ["image", "truth", "full", "full error", EVIL, f"{EVIL} error"]
    valid = shown["truth"][..., 3] == 255
    assert not valid[0, 0] and valid.sum() == valid.size - 1
    np.testing.assert_array_equal(shown[EVIL][valid], shown["truth"][valid])  # it says the truth
    assert (shown[f"{EVIL} error"][valid][:, :3] == [0, 0, 4]).all()
    lightness = shown["full"][..., :3] @ [0.2126, 0.7152, 0.0722]
    truth = shown["truth"][..., :3] @ [0.2126, 0.7152, 0.0722]
    assert (lightness[valid] >= truth[valid] - 1).all() and lightness.mean() > truth[valid].mean()  # 2 px nearer
    off = shown["full error"][valid]
    assert (off == off[0]).all() and off[0, 0] > 0  # 2 px of 10 everywhere


def test_near_is_light_for_depth_too() -> None:
    truth = np.array([[1.0, 2.0, 8.0]], np.float32)
    ends = depthpictures.value_range(Kind.MONO, truth, np.ones((1, 3), bool))
    assert ends.dark > ends.light
    made = depthpictures.values(Kind.MONO, np.array([[0.0, 1, 2, 8, 1e9]], np.float32), ends)[..., :3].sum(-1)[0]
    assert made[0] == made[1] > made[2] > made[3] == made[4]
    flat = depthpictures.value_range(Kind.STEREO, np.full((1, 2), 3, np.float32), np.ones((1, 2), bool))
    assert (flat.dark, flat.light) == (3, 4)


def test_large_pictures_are_thinned_for_the_page_and_whole_as_files(tmp_path: Path) -> None:
    wide = picture(width=1500)
    small = depthpictures.thinned(wide)
    assert small.truth.shape == (2, 500) and set(small.truth.ravel()) <= set(wide.truth.ravel())
    assert depthpictures.thinned(small).truth.shape == small.truth.shape
    paths = depthpictures.write(tmp_path, result())
    assert len(paths) == len(set(paths)) == 12 and all(path.parent == tmp_path for path in paths)
    assert (tmp_path / "stereo-wide-truth.png").is_file() and (tmp_path / "mono-a-room-b-x-error.png").is_file()
    assert decoded((tmp_path / "stereo-wide-image.png").read_bytes()).shape == (6, 1500, 3)


def test_names_that_differ_in_signs_alone_have_files_of_their_own(tmp_path: Path) -> None:
    truth = picture().truth
    one = Picture("p", picture().image, truth, picture().valid, {"a+": truth, "a-": truth})
    suite = Suite(Kind.STEREO, 6, 12, (), (), pictures=(one,))
    names = sorted(path.name for path in depthpictures.write(tmp_path, DepthResult((suite,))))
    assert len(names) == 6 and "stereo-p-a-2.png" in names


def test_pictures_of_the_page_are_those_of_the_maps(page: str) -> None:
    embedded = [base64.b64decode(found) for found in re.findall(r'base64,([^"]+)"', page)]
    wanted = [each.png for each in depthpictures.drawn(Kind.MONO, picture())]
    assert all(each in embedded for each in wanted)
