"""Which settings win: by more than the noise, confirmed, within the time; and one real search on a tiny bundle."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rlkit.profiles import options, tune
from rlkit.profiles.options import Change, Facts
from rlkit.profiles.tune import Outcome, Sample, Verdict
from rlkit.recover.progress import Progress
from rlkit.runtime import hugepages
from rlkit.runtime.tuned import Tuned

FOUR = Facts(tuple(range(8)), (0, 2, 4, 6), 4, limited=False, huge_pages=True, arm64=False, two_bits=True)
TWO = Facts((0, 1), (0, 1), 2, limited=False, huge_pages=False, arm64=False, two_bits=False)
DEFAULT = Tuned(4)
SPIN = "session.intra_op.allow_spinning"


class Fake:
    """A machine whose speed is a function of the settings, and whose clock only measuring moves."""

    def __init__(
        self, speed: Callable[[Tuned], float], *, noise: float = 0.0, opening: float = 1.0, seed: int = 0
    ) -> None:
        self.speed, self.noise, self.opening, self.room = speed, noise, opening, 6
        self.round_seconds, self.now, self.rng = 1.0, 0.0, random.Random(seed)
        self.open: set[str] = set()
        self.rounds: list[Tuned] = []

    def clock(self) -> float:
        return self.now

    def round(self, tuned: Tuned) -> Sample:
        if repr(tuned) not in self.open:
            self.now += self.opening
            self.open.add(repr(tuned))
        self.now += self.round_seconds
        self.rounds.append(tuned)
        slow = 1 / self.speed(tuned) * self.rng.uniform(1 - self.noise, 1 + self.noise)
        return Sample(0.001 * slow, 0.01 * slow)

    def fresh(self) -> None:
        self.open.clear()


def search(fake: Fake, facts: Facts = FOUR, *, seconds: float = 300.0, inexact: bool = False) -> Outcome:
    return tune.tune(fake, facts, DEFAULT, seconds=seconds, inexact=inexact, clock=fake.clock)


def labels(outcome: Outcome, *, won: bool) -> list[str]:
    return [trial.label for trial in outcome.trials if trial.won is won and trial.axis != "once more"]


def test_what_is_faster_wins_and_adds_up() -> None:
    def speed(tuned: Tuned) -> float:
        spinning = 1.2 if tuned.session_options.get(SPIN) == "0" else 1.0
        return spinning * (1.3 if tuned.threads == 3 else 1.0) * (1.1 if tuned.environment else 1.0)

    found = search(Fake(speed))
    assert found.tuned == Tuned(3, {SPIN: "0"}, options.SMALL_PAGES)
    assert labels(found, won=True) == ["3 threads", "no spinning", "small pages"]
    assert found.against is not None and found.against.cost == pytest.approx(1 / 1.56)
    again = [(trial.label, trial.won) for trial in found.trials if trial.axis == tune.AGAIN]
    assert again == [(f"3 threads, {SPIN}=0", True), ("GLIBC_TUNABLES=glibc.malloc.hugetlb=0", True)]
    assert not found.left_out


def test_where_nothing_matters_the_default_stays() -> None:
    found = search(Fake(lambda _tuned: 1.0))
    assert found.tuned == DEFAULT and not found.changed and found.against is None
    assert not labels(found, won=True) and len(labels(found, won=False)) == 9
    assert found.to_json()["changed"] is False


def test_a_gain_within_the_noise_is_none() -> None:
    def speed(tuned: Tuned) -> float:
        return 1.04 if tuned.session_options else 1.0

    assert search(Fake(speed)).changed
    assert not search(Fake(speed, noise=0.3)).changed
    assert not search(Fake(lambda tuned: 1.015 if tuned.session_options else 1.0)).changed  # less than LEAST


def test_what_is_not_confirmed_in_fresh_processes_is_dropped() -> None:
    fake = Fake(lambda _tuned: 1.0)
    fake.speed = lambda tuned: 1.2 if tuned.session_options and not fresh else 1.0
    fresh: list[bool] = []
    fake.fresh = lambda: fresh.append(True)  # type: ignore[method-assign]
    found = search(fake, replace(FOUR, huge_pages=False))
    assert found.tuned == DEFAULT and fresh == [True]
    assert (found.trials[-1].axis, found.trials[-1].won) == ("once more", False)


def samples(*pairs: tuple[float, float]) -> list[Sample]:
    return [Sample(prefill, decode) for prefill, decode in pairs]


def test_neither_prompts_nor_replies_may_lose_much() -> None:
    base = samples(*[(0.001, 0.01)] * 5)
    assert Verdict.of(samples(*[(0.0010, 0.007)] * 5), base).wins
    assert not Verdict.of(samples(*[(0.0012, 0.007)] * 5), base).wins
    assert not Verdict.of(samples(*[(0.0001, 0.011)] * 5), base).wins


def test_noise_is_of_paired_ratios() -> None:
    drifting = [0.01 * factor for factor in (1.0, 1.5, 2.0, 3.0, 5.0)]  # the machine slows down under both
    base = [Sample(second, second) for second in drifting]
    verdict = Verdict.of([Sample(0.9 * second, 0.9 * second) for second in drifting], base)
    assert verdict.wins and verdict.noise < 1e-9 and verdict.cost == pytest.approx(0.9)
    shaken = [
        Sample(second * shake, second * shake)
        for second, shake in zip(drifting, (0.5, 0.7, 0.9, 1.3, 1.4), strict=True)
    ]
    assert not Verdict.of(shaken, base).wins


def test_a_win_needs_nearly_all_rounds() -> None:
    base = samples(*[(0.001, 0.01)] * 7)
    few = samples(*[(0.0005, 0.005)] * 5, *[(0.00101, 0.0101)] * 2)
    assert not Verdict.of(few, base).wins
    assert Verdict.of([*few[:5], few[0], few[6]], base).wins
    assert not Verdict.of([*few[:3], few[6]], base[:4]).wins


def test_a_far_slower_variant_is_given_up_early() -> None:
    fake = Fake(lambda tuned: 0.3 if tuned.threads == 8 else 1.0)
    found = search(fake)
    trial = next(trial for trial in found.trials if trial.label == "8 threads")
    assert trial.note == "far slower" and trial.verdict is not None and trial.verdict.rounds == 2
    assert len([tuned for tuned in fake.rounds if tuned.threads == 8]) == 3


def test_a_variant_that_cannot_win_any_more_is_given_up() -> None:
    fake = Fake(lambda tuned: 0.95 if tuned.threads == 8 else 1.0)
    found = search(fake)
    trial = next(trial for trial in found.trials if trial.label == "8 threads")
    assert trial.note == "no faster" and trial.verdict is not None and trial.verdict.rounds == tune.LEAST_ROUNDS


def test_a_busy_machine_is_noticed() -> None:
    found = search(Fake(lambda _tuned: 1.0))
    assert not found.busy and replace(found, load=0.5).busy and not replace(found, load=0.1).busy
    assert replace(found, load=0.5).to_json()["busy"] is True


def test_settings_that_do_not_work_are_noted_and_lose() -> None:
    def speed(tuned: Tuned) -> float:
        if tuned.session_options.get(SPIN):
            raise ChildProcessError("the process measuring it failed: no such option")
        return 1.0

    found = search(Fake(speed))
    trial = next(trial for trial in found.trials if trial.label == "no spinning")
    assert not trial.won and trial.verdict is None and "no such option" in trial.note
    with pytest.raises(ChildProcessError, match="it ended"):
        search(Fake(lambda _tuned: (_ for _ in ()).throw(ChildProcessError("it ended"))))


@pytest.mark.parametrize("seconds", [5.0, 30.0, 60.0, 100.0])
@pytest.mark.parametrize("opening", [0.1, 6.0])
def test_the_time_holds(seconds: float, opening: float) -> None:
    fake = Fake(lambda tuned: 1.5 if tuned.session_options else 1.0, opening=opening)
    found = search(fake, seconds=seconds)
    last = 2 * opening + 2 * (1 + tune.FEWEST) * fake.round_seconds  # a comparison that is always made
    assert fake.now <= max(seconds, 0.0) + last + 1e-6
    assert found.seconds == fake.now
    if seconds == 5.0:
        assert not found.changed and len(found.left_out) == 9


def test_nothing_is_left_out_when_there_is_time() -> None:
    assert search(Fake(lambda _tuned: 1.0), seconds=1000.0).left_out == ()


def test_with_room_for_one_every_round_opens_anew_and_is_counted_so() -> None:
    fake = Fake(lambda _tuned: 1.0, opening=10.0)
    fake.room = 1
    found = search(fake, seconds=60.0)
    assert len(found.left_out) == 9 and fake.now < 20


def test_progress_is_time() -> None:
    told: list[Progress] = []
    fake = Fake(lambda _tuned: 1.0)
    tune.tune(fake, TWO, Tuned(2), seconds=100.0, tell=told.append, clock=fake.clock)
    assert [event.done for event in told] == sorted(event.done for event in told)
    assert (told[-1].done, told[-1].total) == (1000, 1000) and told[1].note.startswith("threads: ")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_no_time_is_an_error(seconds: float) -> None:
    with pytest.raises(ValueError, match="leave no time to measure"):
        search(Fake(lambda _tuned: 1.0), seconds=seconds)


def test_no_measurement_is_an_error() -> None:
    for pair in ((0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="are no measurement"):
            Sample(*pair)


def changes(facts: Facts, *, inexact: bool = False) -> dict[str, tuple[Change, ...] | None]:
    return dict(options.axes(facts, inexact=inexact))


def test_thread_counts_come_from_cores_and_their_threads() -> None:
    assert options.thread_counts(FOUR) == (4, 8, 3, 2)
    assert options.thread_counts(TWO) == (2, 1)
    assert options.thread_counts(replace(FOUR, limited=True)) == (4, 3, 2)
    assert options.thread_counts(replace(FOUR, fast=2)) == (4, 2, 8, 3)
    assert options.thread_counts(Facts((5,), (5,), 1, False, False, False, False)) == (1,)


def test_other_kernels_are_tried_only_where_asked_for() -> None:
    assert "kernels" not in changes(FOUR)
    (lut,) = changes(FOUR, inexact=True)["kernels"] or ()
    assert lut.options == {"mlas.use_lut_gemm": "1"}
    assert "kernels" not in changes(TWO, inexact=True)
    (kleidi,) = changes(replace(TWO, arm64=True), inexact=True)["kernels"] or ()
    assert kleidi.options == {"mlas.disable_kleidiai": "1"}


def test_pages_are_tried_where_they_have_to_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pages" in changes(FOUR) and "pages" not in changes(TWO)
    monkeypatch.setattr(hugepages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for text, asks in (("always [madvise] never", True), ("[always] madvise never", False), ("", False)):
        (tmp_path / "enabled").write_text(text)
        assert hugepages.must_be_asked_for(tmp_path / "enabled") is asks
    assert not hugepages.must_be_asked_for(tmp_path / "nowhere")
    for libc in (("glibc", "2.31"), ("", ""), ("musl", "1.2")):
        monkeypatch.setattr(hugepages.platform, "libc_ver", lambda libc=libc: libc)
        (tmp_path / "enabled").write_text("always [madvise] never")
        assert not hugepages.must_be_asked_for(tmp_path / "enabled")


def test_affinity_numbers_processors_from_one_and_leaves_the_first_thread_alone() -> None:
    (held,) = options.affinities(FOUR, 3)
    assert held.options == {"session.intra_op_thread_affinities": "3;5"}
    assert options.affinities(FOUR, 1) == () and options.affinities(FOUR, 8) == ()
    assert held.apply(Tuned(3, {"a": "b"})) == Tuned(3, {"a": "b", **held.options})
