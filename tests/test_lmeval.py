"""lm-evaluation-harness itself, on small tasks over local files: our class, its class for torch models, our server."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

import tiny
from rlkit.apps import serve
from rlkit.export.build import export_bundle
from rlkit.runtime.session import open_bundle
from served import serving

pytestmark = pytest.mark.slow

PLACES = ("mat", "roof", "chair", "table", "bed", "box")
BROKEN = "\ufffd"  # bytes that are no character, which random weights like; a stream of text leaves them out
ANIMALS = ("cat", "dog", "mouse", "bird", "fish")
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

CHOICE = """
task: rlkit_places
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
"""
WRITE = """
task: rlkit_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 3, do_sample: false}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1}}
"""
ROLL = """
task: rlkit_roll
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""
TASKS = ("rlkit_places", "rlkit_write", "rlkit_roll")


def items() -> list[dict[str, Any]]:
    """Questions with choices of one and of several tokens; contexts that begin alike, and one that ends in a space."""
    rng = random.Random(3)
    made: list[dict[str, Any]] = []
    for number in range(30):
        animal, places = rng.choice(ANIMALS), rng.sample(PLACES, 4)
        question = f"the {animal} sat on the {rng.choice(PLACES)} and looked at the"
        choices = [f" {place}" for place in places] if number % 3 else [f" {place} of the {animal}" for place in places]
        if number % 7 == 0:
            question, choices = f"{question} ", [choice.strip() for choice in choices]
        text = f"{question}{choices[0]}. " * (1 + 8 * (number == 4))
        made.append({"question": question, "choices": choices, "answer": rng.randrange(4), "text": text})
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks, a checkpoint, and an exact bundle of it."""
    folder = tmp_path_factory.mktemp("harness")
    for task, text in zip(TASKS, (CHOICE, WRITE, ROLL), strict=True):
        (folder / f"{task}.yaml").write_text(text.format(folder=folder))
    checkpoint = tiny.checkpoint(tiny.llama(folder / "hf"), folder / "checkpoint", tiny.W8)
    session = open_bundle(export_bundle(checkpoint, folder / "bundle", accuracy_level=0))
    made = items()
    for item in made:
        ids = [token.id for token in session.generate(session.encode(item["question"]), 3)]
        text = tiny.tokenizer().decode(ids)
        item["written"] = "nothing of the kind" if item["answer"] % 2 or BROKEN in text else text
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in made))
    return folder


PROGRAM = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
from rlkit.apps.lmeval import register
folder, model, arguments, tasks = json.loads(sys.argv[1])
register()
if model == "torch":
    sys.path.insert(0, sys.argv[2])
    import tiny
    from pathlib import Path
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/bundle")
    dequantized = tiny.dequantized(Path(folder) / "checkpoint")
    model = HFLM(pretrained=dequantized, tokenizer=tokenizer, device="cpu", batch_size=4)
manager = TaskManager(include_path=folder, include_defaults=False)
found = lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=tasks, task_manager=manager, bootstrap_iters=0)
samples = {task: sorted(some, key=lambda one: one["doc_id"]) for task, some in found["samples"].items()}
kept = {task: [[one["doc_id"], one["filtered_resps"]] for one in some] for task, some in samples.items()}
print(json.dumps({"results": found["results"], "samples": kept, "config": str(found["config"])}, default=str))
"""


def evaluated(root: Path, model: str, arguments: dict[str, Any], tasks: tuple[str, ...] = TASKS) -> dict[str, Any]:
    """Results and samples of the harness, in a process of its own: its imports warn, and are heavy."""
    asked = json.dumps([str(root), model, arguments, list(tasks)])
    home = {"HF_HOME": str(root / "cache"), "HF_DATASETS_CACHE": str(root / "cache" / "datasets")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, asked, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **SETTINGS, **home},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def numbers(found: dict[str, Any], task: str) -> np.ndarray[Any, Any]:
    """What a task's items scored, as one row of numbers."""
    return np.array([float(one) for _doc, answers in found["samples"][task] for one in _flat(answers)])


def shares(found: dict[str, Any]) -> list[float]:
    """The shares of items that are right."""
    metrics = {"rlkit_places": ("acc,none", "acc_norm,none"), "rlkit_write": ("exact_match,none",)}
    return [found["results"][task][name] for task, names in metrics.items() for name in names]


def written(found: dict[str, Any]) -> list[tuple[int, str]]:
    """Replies, without what is no character."""
    return [(doc, replies[0].replace(BROKEN, "")) for doc, replies in found["samples"]["rlkit_write"]]


def _flat(answers: Any) -> Iterator[Any]:
    if isinstance(answers, list):
        for one in answers:
            yield from _flat(one)
    else:
        yield {"True": 1, "False": 0}.get(answers, answers) if isinstance(answers, str) else answers


@pytest.fixture(scope="module")
def ours(root: Path) -> dict[str, Any]:
    return evaluated(root, "rlkit", {"bundle": str(root / "bundle"), "threads": 1})


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    pool = serve.make_pool([root / "bundle"], slots=4, queue=64, memory=None)
    with contextlib.closing(pool), serving(pool) as found:
        yield found


PAIRS = """
import json, random, sys
from types import SimpleNamespace
from pathlib import Path
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer
from rlkit.apps.lmtokens import Tokens
folder = sys.argv[1]
theirs = HFLM.__new__(HFLM)  # what it does with text, without a model
theirs.__dict__ |= {"tokenizer": AutoTokenizer.from_pretrained(folder), "backend": "causal"}
theirs.__dict__ |= {"add_bos_token": None, "custom_prefix_token_id": None, "enable_thinking": None}
theirs._loglikelihood_tokens = lambda requests, **_: [(list(one[1]), list(one[2])) for one in requests]
ours, rng, found = Tokens(Path(folder), 2), random.Random(1), {"same": 0, "other": 0, "refused": 0}
words = ["the", " cat", " ", "  ", "\\n", "\\t", "\u00e9", "\u4e2d", "sm", "all", ".", "<|im_end|>", "<|im_start|>"]
for _ in range(3000):
    context, continuation = ("".join(rng.choices(words, k=rng.randrange(7))) for _ in range(2))
    request = SimpleNamespace(args=(context, continuation), task_name=None)
    try:
        (pair,) = theirs.loglikelihood([request], disable_tqdm=True)
    except IndexError:  # an empty continuation
        pair = ([], [])
    same = pair == ours.pair(context, continuation)
    found["refused" if not all(pair) else "same" if same else "other"] += 1
print(json.dumps(found))
"""


@pytest.mark.parametrize("adding", [False, True], ids=["plain", "first token added"])
def test_text_becomes_ids_as_in_the_harness(tmp_path: Path, adding: bool) -> None:
    tokenizer = tiny.tokenizer()
    if adding:
        first = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
        tokenizer.backend_tokenizer.post_processor = first
    tokenizer.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PAIRS, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["other"] == 0 and found["same"] > 2000


def test_a_bundle_scores_as_the_torch_model_does(root: Path, ours: dict[str, Any]) -> None:
    theirs = evaluated(root, "torch", {})
    for task in ("rlkit_places", "rlkit_roll"):
        np.testing.assert_allclose(numbers(ours, task), numbers(theirs, task), atol=1e-3)
    assert len(numbers(ours, "rlkit_places")) == 30 * 4 * 2
    assert ours["samples"]["rlkit_write"] == theirs["samples"]["rlkit_write"]
    assert shares(ours) == shares(theirs)
    assert all(0 < share < 1 for share in shares(ours))
    assert "'truncated': 0" in ours["config"]


@pytest.mark.parametrize("tokenized", [False, True], ids=["text", "ids"])
def test_the_server_scores_as_the_bundle_does(root: Path, ours: dict[str, Any], address: str, tokenized: bool) -> None:
    arguments = {
        "model": "bundle",
        "base_url": f"{address}/v1/completions",
        "tokenizer": str(root / "bundle"),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": tokenized,
        "max_length": 256,
        "num_concurrent": 3 if tokenized else 1,
        "max_retries": 1,
    }
    theirs = evaluated(root, "local-completions", arguments, TASKS[:2])
    np.testing.assert_allclose(numbers(theirs, "rlkit_places"), numbers(ours, "rlkit_places"), atol=1e-3)
    assert shares(ours) == shares(theirs)
    assert written(theirs) == written(ours)


def test_the_command_runs_the_harness_with_a_bundle(root: Path) -> None:
    home = {"HF_HOME": str(root / "cache"), "HF_DATASETS_CACHE": str(root / "cache" / "datasets")}
    words = [
        "--model_args",
        f"bundle={root / 'bundle'},threads=1",
        "--tasks",
        "rlkit_places",
        "--include_path",
        str(root),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "rlkit.apps.cli", "lm-eval", "--json", *words, "--limit", "4", "--apply_chat_template"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **SETTINGS, **home},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["schema_version"] == 1 and found["config"]["model"] == "rlkit"
    assert found["config"]["rlkit"]["bundle"] == "bundle"
    assert found["n-samples"]["rlkit_places"]["effective"] == 4
    assert found["chat_template"] == tiny.CHAT_TEMPLATE
    assert "rlkit_places" in done.stderr
