"""Benchmarks made in a test: a wheel of request files and Arrow data, and models that answer by a rule of their own."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wheels
from rlkit.profiles.evaluation import Subject, Tokens
from rlkit.profiles.taskitem import Item, Rule
from rlkit.profiles.taskreply import Said
from rlkit.profiles.tasks import Group, Spec, Task
from rlkit.profiles.taskscore import Pair

# super_glue/copa in three rows, written by pyarrow: strings, int32 and int64.
COPA = (
    "c-pm7J5Iwu5S=8>N0E_SL?}W*T8S1SK}DICE(I6Z*qg+P6C2x6Ql{Vl93e-bq)bUcK|w*8BX9%r))|6X6j3qK%<Rm(w`;v!XIYkw"
    "OGFN7Ym!Yhs!{_hSjj?7s2YeCM*;#pa9)tt@Cbg*GlBg;EbIN++|yQt2XdeS<hL9{r5-}RfbSIW6}ay$ai$Hg=Vxn<K)By=swPKc"
    "?&c~<{cxu1C2)@gZ1H>QaCaQ~uDYT%Fz<ijF6kK<hgvwNhQ3zDVcmXzi{?eKn)-=C&)WB~MfL>kT3p+7%!=Fjj#RPo^R>Rjchbhh"
    ";ydZ^T~+AY96D@{kuNy+3|!B^^$q;Wz^@Ga1Lt$j8w0;F@UKR_HSpWLK0Es`=3jNY(5o4`&_C4L^xd7YHn(FXT$zfY3IZXMK&hy!"
    "dtNva0~t@0*S$$aEd3c)%s+ykG9SZ*OhoF(nD2;TEW$|5xE{qaNrV^sKlvxDHS^^{PE?MchT%*kDlL#lAwcL*;a_aB_O6^KDi3Nn"
    "RBoETW_bC)dny&)vCf~Otb%y"
)
# mmlu: question, subject, choices (list of strings), answer (int64); two rows.
MMLU = (
    "c-oCpOHRWu5S_G16DotUK!^oMS+HZ%mS0)52VmdsP>C!hsA&aGfdg;=mMmEG2t5QxV8J1{LzuCrjb*8VCyk#ce)I9fRaI4e4<H6Y"
    "8w9i<fCzU8&qp87i*WUMHTH$}jy7cf2J>J*gYqQ&jnG1y%+#}dq&xyG)Ojd7#lD(2v5)&Bj>C3<{17e8=6Na=l&D)7Z9p{+ts2C6"
    "DGS<vpyqpvj`FF+-Mvgp_(V;NRU+&#)VGXz1}4tF1NHl`kgCk*GgHssoMD>k#WVd91RU@Lh0Y31U-z(rHQMM4Jx!YN5183EpvEq2"
    "hhUDGkC{7;uH)#3%<DeKj(+UuGv|EmpD@2M?=UYN{nF`^5IFaQfB4ZK=Y&0L4x?;RCb>#_$!XFXjIun<$dylWHb^#qpq_&&Ce!Jy"
    "S`@0@f%UHJ`X1MB@>#&|JGAC-c7Abr)xYj`tr(jt{Wbx90rY%QYX"
)


def packed(text: str) -> bytes:
    """The bytes that a constant above stands for."""
    return zlib.decompress(base64.b85decode(text))


def request(document: int, context: str, continuation: str, label: Any = None, **more: Any) -> dict[str, Any]:
    """One line of a request file."""
    asked = {"context": context, "continuation": continuation}
    return {"request_type": "loglikelihood", "doc_id": document, "label": label, "request": asked, **more}


def lines(requests: Sequence[dict[str, Any]], *, zipped: bool = True) -> bytes:
    """A request file."""
    text = "".join(json.dumps(one) + "\n" for one in requests).encode()
    return gzip.compress(text) if zipped else text


def choice(
    document: int, context: str, choices: Sequence[str], label: int, *, plain: bool = False
) -> list[dict[str, Any]]:
    """The lines of an item; `plain` adds those without its question."""
    asked = [request(document, context, one, label) for one in choices]
    return asked + ([request(document + 1_000_000, "Answer:", one, label) for one in choices] if plain else [])


def wheel(folder: Path, members: dict[str, bytes]) -> Path:
    """A wheel like the asset."""
    return wheels.build(folder, members, name="olmo", version="1.0")


def spec(name: str = "made", rule: Rule = Rule.RAW, group: Group = Group.REGULAR, items: int = 0) -> Spec:
    """A task's description."""
    return Spec(name, name.title(), "made in a test", group, "MIT", f"{name}/rc", rule, items)


def task(items: Sequence[Item], name: str = "made", rule: Rule = Rule.RAW, group: Group = Group.REGULAR) -> Task:
    """A task of these items."""
    return Task(spec(name, rule, group, len(items)), tuple(items), f"{len(items):064x}")


@dataclass(frozen=True, slots=True)
class Answer:
    """A continuation as a scorer returns it."""

    logprob: float
    tokens: int
    greedy: bool


@dataclass(slots=True)
class Speaker:
    """A model of characters (one id each) that says of a continuation what `says` says; keeps what it was asked."""

    says: Callable[[str, str], float]
    stop_after: int | None = None
    replied: Callable[[str], str] = str  # an empty reply is none
    asked: list[tuple[str, str]] = field(default_factory=list)
    opened: int = 0

    def score(self, pairs: Sequence[Pair]) -> list[Answer]:
        """By text."""
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        texts = [("".join(map(chr, context)), "".join(map(chr, following))) for context, following in pairs]
        self.asked += texts
        found = [(self.says(*both), len(both[1])) for both in texts]
        return [Answer(logprob, tokens, logprob > -1.0) for logprob, tokens in found]

    def replies(self, texts: Mapping[str, str], most: int) -> Iterator[Said]:
        """By text, cut after `most` characters."""
        for name, text in texts.items():
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            said = self.replied(text)
            self.asked.append((text, said))
            yield Said(name, said[:most], len(said[:most]), len(said) < most, "" if said else "nothing to say")

    def subject(self, name: str = "speaker", limit: int = 1000, start: int | None = 1, identity: str = "") -> Subject:
        """This model to be evaluated."""

        def opened() -> tuple[Speaker, Tokens]:
            self.opened += 1
            return self, Tokens(lambda text: [ord(char) for char in text], limit, start)

        return Subject(name, identity or name, opened, lambda: opened()[0], "template")
