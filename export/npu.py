"""The folder that AMD's flow for the Ryzen AI NPU takes, what is known of that NPU, and the step left for Windows.

    checkpoint --rlkit export --target npu--> folder: int4 ONNX in the GenAI builder's layout for dml, npu.json,
                                              genai_config.ryzenai.json
    folder --model_generate, on Windows with Ryzen AI--> a folder that the NPU runs      (`finish` calls the tool)

The folder's own genai_config.json names no provider, so that stock onnxruntime-genai runs it on the CPU, for a
numerical check: with RyzenAI among the provider options the stock runtime refuses to load a model on machines without
that provider's library (tried with 0.18, 2026-11). What the finished folder shall have is in
genai_config.ryzenai.json, and `finish` merges it into what the tool wrote. `search.chunk_size` stands in both: the CPU
gives the same tokens with it.

Nothing here was run on an NPU. Sources, unless said otherwise: Ryzen AI documentation 1.8 (OGA flow, model preparation,
operator preparation), release notes to 1.9.0 of October 2026; read 2026-11.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlkit.export.plan import Plan
from rlkit.export.targets import NPU_OPS
from rlkit.recover.atomic import fresh_folder, refuse_existing, write_json
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.source import ModelShape, read_json

SCHEMA_VERSION = 1
NOTES, CONFIG, RYZEN_CONFIG = "npu.json", "genai_config.json", "genai_config.ryzenai.json"
RYZEN_AI = "1.8.0"
DRIVER = "32.0.203.280"  # the oldest NPU driver that 1.8 takes
TOOL = "model_generate"
INSTALL = "https://ryzenai.docs.amd.com/en/latest/inst.html"
PREPARE = "https://ryzenai.docs.amd.com/en/latest/oga_model_prepare.html"
GROUPS = (32, 64, 128)  # quantization schemes uint4_wo_32, _64 and _128
PUBLISHED_GROUP = 128  # of nearly all published models
CHUNK = 2048  # tokens of a prompt at a time, as documented for long context
WINDOW = 4096  # tokens beyond which the hybrid mode needs chunks
_OWN_FILES = frozenset({NOTES, CONFIG, RYZEN_CONFIG, "rlkit.json", "config.json"})
_SMALL = (".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to run: the tool's arguments, tokens of prompt and reply together (None: undocumented), what it does."""

    name: str
    arguments: tuple[str, ...]
    max_tokens: int | None
    about: str


_LONG = 16384
MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("hybrid", ("--hybrid",), None, "prompt on the NPU, reply on the iGPU; beyond 4096 tokens in chunks"),
        Mode("full-fusion", ("--npu", "--full_fusion"), WINDOW, "NPU only, the fastest of these, short context"),
        Mode(
            "token-fusion",
            ("--npu", "--token_fusion", "--extra_options", f"max_seq_len={_LONG}"),
            _LONG,
            "NPU only, long context; 1.9.0 announces more than 16K, in a form that was not read",
        ),
        Mode("basic", ("--npu", "--basic"), None, "NPU only, without fusion"),
        Mode("eager", ("--npu", "--eager"), None, "NPU only, operator by operator"),
    )
}


@dataclass(frozen=True, slots=True)
class Part:
    """A processor family with an NPU, and whether language models run on it."""

    name: str
    npu: str
    runs_llms: bool
    about: str


PARTS = (
    Part("STX", "XDNA 2", True, "Strix Point: Ryzen AI 9 HX 375, HX 370, 365"),
    Part("STX-Halo", "XDNA 2", True, "Strix Halo: Ryzen AI Max"),
    Part("KRK", "XDNA 2", True, "Krackan Point: Ryzen AI 300"),
    Part("PHX", "XDNA", False, "Phoenix: Ryzen 7040; no language models"),
    Part("HPT", "XDNA", False, "Hawk Point: Ryzen 8040; no language models"),
)

# Models of the 1.8 lists, with the sizes that decide the shapes of their operators: hidden, ffn, heads, KV heads, head
# size, vocabulary; from the models' own config.json. Fine-tunes of these have compiled operators. GPT-OSS-20B, Hunyuan
# and HY-MT1.5 are listed too; their sizes are not recorded here.
PUBLISHED: dict[tuple[int, ...], tuple[str, ...]] = {
    (576, 1536, 9, 3, 64, 49152): ("SmolLM2-135M",),
    (2048, 8192, 32, 8, 64, 128256): ("Llama-3.2-1B",),
    (3072, 8192, 24, 8, 128, 128256): ("Llama-3.2-3B",),
    (4096, 14336, 32, 8, 128, 128256): ("Llama-3-8B", "Llama-3.1-8B"),
    (4096, 14336, 32, 8, 128, 32000): ("Mistral-7B v0.1", "Mistral-7B v0.2"),
    (4096, 14336, 32, 8, 128, 32768): ("Mistral-7B v0.3",),
    (3072, 8192, 32, 32, 96, 32064): ("Phi-3.5-mini",),
    (3072, 8192, 24, 8, 128, 200064): ("Phi-4-mini",),
    (896, 4864, 14, 2, 64, 151936): ("Qwen2.5-0.5B",),
    (1536, 8960, 12, 2, 128, 151936): ("Qwen2.5-1.5B",),
    (2048, 11008, 16, 2, 128, 151936): ("Qwen2.5-3B",),
    (3584, 18944, 28, 4, 128, 152064): ("Qwen2.5-7B",),
    (2048, 6144, 16, 8, 128, 151936): ("Qwen3-1.7B",),
    (2560, 9728, 32, 8, 128, 151936): ("Qwen3-4B",),
    (4096, 12288, 32, 8, 128, 151936): ("Qwen3-8B",),
    (2560, 10240, 8, 4, 256, 262208): ("Gemma-3-4B",),
}


def mode_named(name: str) -> Mode:
    """The entry of MODES; ValueError naming the ones there are."""
    if name not in MODES:
        raise ValueError(f"NPU mode {name!r} does not exist; use {', '.join(MODES)}")
    return MODES[name]


def published(shape: ModelShape) -> tuple[str, ...]:
    """The models of AMD's list that have operators of these shapes; none means they would have to be compiled."""
    sizes = (shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim, shape.vocab)
    return PUBLISHED.get(sizes, ())


def command(mode: Mode, source: str, out: str) -> list[str]:
    """The tool's command line, word by word."""
    return [TOOL, "--input", source, "--output", out, *mode.arguments]


def npu_json(
    plan: Plan, shape: ModelShape, *, mode: str = "hybrid", folder: str = "BUNDLE", findings: int | None = None
) -> dict[str, Any]:
    """What npu.json says: version, mode, what was checked and what could not be, and the next commands on Windows.

    `findings` is what lint found in the written file, None if it was not asked.
    """
    chosen = mode_named(mode)
    if plan.target.device != "npu":
        raise ValueError(f"the plan is for {plan.target.name}, not for an NPU; plan it with --target npu")
    return {
        "schema_version": SCHEMA_VERSION,
        "ryzen_ai": RYZEN_AI,
        "driver": DRIVER,
        "mode": chosen.name,
        "modes": [asdict(one) for one in MODES.values()],
        "parts": [asdict(part) for part in PARTS],
        "operators": sorted(NPU_OPS),
        "layout": {"builder": plan.target.provider, "dtype": plan.target.dtype, "weights": "uint4, zero points stored"},
        "max_tokens": min(filter(None, (shape.max_context, chosen.max_tokens))),
        "checks": [asdict(check) for check in _checks(plan, shape, chosen, findings)],
        "next": next_commands(shape, chosen, folder),
        "sources": [PREPARE, INSTALL],
        "notes": list(plan.target.notes),
    }


@dataclass(frozen=True, slots=True)
class Check:
    """Something the NPU's flow asks for: met, unmet or unverified, and why."""

    what: str
    state: str
    why: str


def _checks(plan: Plan, shape: ModelShape, mode: Mode, findings: int | None) -> Iterator[Check]:
    packed = [tensor for tensor in plan.tensors if tensor.group is not None]
    groups = sorted({tensor.group for tensor in packed if tensor.group is not None})
    asked = all(group in GROUPS for group in groups)
    usual = f"groups of {', '.join(map(str, groups))}; nearly all published models have {PUBLISHED_GROUP}"
    yield Check("groups of 32, 64 or 128", "met" if asked else "unmet", usual)
    plain = [tensor.name for tensor in packed if tensor.bits != 4 or not tensor.zero_points]
    form = f"{plain[0]} is another" if plain else f"{len(packed)} matrices"
    yield Check("uint4 weights with zero points", "unmet" if plain else "met", form)
    wide = sum("-bit fields" in tensor.reason for tensor in packed)
    yield Check("2-bit codes stored as 4-bit ones", "met", f"{wide} matrices, exact; no gain in time or memory there")
    words = {None: ("unverified", "lint was not asked"), 0: ("met", "lint found nothing in the written file")}
    state, why = words.get(findings, ("unmet", f"lint has {findings} findings; rlkit lint lists them"))
    yield Check("operators that the NPU is known to run", state, why)
    models = published(shape)
    same = f"those of {', '.join(models)}" if models else "of no listed model: operators have to be compiled first"
    yield Check("operator shapes that come compiled", "met" if models else "unverified", same)
    limit = mode.max_tokens or shape.max_context
    room = f"{mode.name} holds {mode.max_tokens or 'an undocumented number of'} tokens, the model {shape.max_context}"
    yield Check("the model's whole context", "met" if limit >= shape.max_context else "unmet", room)
    yield Check(f"{TOOL} takes the folder", "unverified", "needs Windows and Ryzen AI; documented for this layout")
    yield Check("runs on the NPU", "unverified", "no NPU was at hand")
    stated = "the folder runs on the CPU provider; rlkit.json states its divergence where it was measured"
    yield Check("numbers on the NPU", "unverified", f"{stated}; the NPU computes in bfloat16 or block floating point")


def next_commands(shape: ModelShape, mode: Mode, folder: str) -> list[str]:
    """What to type on Windows, in order; a folder name with spaces is quoted."""
    lines = [f"conda activate ryzen-ai-{RYZEN_AI}"]
    if not published(shape):  # documented as experimental, for the hybrid mode
        lines += [
            f"onnx_utils vaiml --model-dir {_quoted(folder)} --plugin_name own --compile --ops_type bfp16",
            "mkdir dd_plugins",
            "copy transaction-plugin\\own.zip dd_plugins",
        ]
    lines.append(" ".join(_quoted(word) for word in command(mode, folder, f"{folder}-{mode.name}")))
    return lines


def _quoted(word: str) -> str:
    return f'"{word}"' if " " in word else word


def npu_config(config: dict[str, Any], *, mode: str = "hybrid") -> dict[str, Any]:
    """A genai_config.json with the RyzenAI provider and prefill in chunks; what the tool wrote there is kept.

    `external_data_file` is left to the tool, which names its own files.
    """
    chosen, made = mode_named(mode), copy.deepcopy(config)
    try:
        options, search = made["model"]["decoder"]["session_options"], made["search"]
        listed = options.get("provider_options") or []
        own: dict[str, Any] = next((entry["RyzenAI"] for entry in listed if "RyzenAI" in entry), {})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{CONFIG} has no decoder or search ({error}); export the bundle again") from error
    if chosen.name == "hybrid":
        own = {"hybrid_opt_max_seq_length": str(WINDOW), **own, "hybrid_opt_chunk_context": "1"}
        search["chunk_size"] = CHUNK
    if chosen.max_tokens is not None:
        search["max_length"] = min(search.get("max_length", chosen.max_tokens), chosen.max_tokens)
    options["provider_options"] = [{"RyzenAI": own}]
    return made


def complete(
    folder: Path,
    plan: Plan,
    shape: ModelShape,
    *,
    mode: str = "hybrid",
    name: str = "BUNDLE",
    findings: int | None = None,
) -> dict[str, Any]:
    """Write npu.json and genai_config.ryzenai.json into an exported folder, chunks into its config; return npu.json.

    `name` is what the folder will be called, in the commands of npu.json.
    """
    config = read_json(folder / CONFIG)
    notes = npu_json(plan, shape, mode=mode, folder=name, findings=findings)
    write_json(folder / RYZEN_CONFIG, npu_config(config, mode=mode))
    config["search"]["chunk_size"] = CHUNK
    write_json(folder / CONFIG, config)
    write_json(folder / NOTES, notes)
    return notes


def finish(
    folder: Path, *, mode: str | None = None, out: Path | None = None, force: bool = False, tell: Tell = silent
) -> Path:
    """Let AMD's tool make the folder that the NPU runs, beside `folder` unless `out` says where; return it.

    It is complete or absent. Raises FileNotFoundError where the tool is not installed, FileExistsError, or ValueError
    with the tool's last line.
    """
    if not (folder / NOTES).is_file():
        raise ValueError(f"{folder} is no NPU bundle, as it has no {NOTES}; make one with: rlkit export --target npu")
    chosen = mode_named(mode or str(read_json(folder / NOTES).get("mode")))
    made = out or folder.absolute().with_name(f"{folder.absolute().name}-{chosen.name}")
    refuse_existing(made, force=force)
    tool = shutil.which(TOOL)
    if tool is None:
        where = f"install Ryzen AI {RYZEN_AI} on Windows ({INSTALL}) and run this in its environment"
        raise FileNotFoundError(f"{TOOL} is not on PATH; {where}")
    with fresh_folder(made, force=force) as work:
        scratch, output = work / ".tool", work / ".made"
        scratch.mkdir()
        words = [tool, *command(chosen, str(folder.absolute()), str(output.absolute()))[1:]]
        _run(words, scratch, tell)
        if not (output / CONFIG).is_file() or not any(output.glob("*.onnx")):
            raise ValueError(f"{TOOL} ended well but left no model with a {CONFIG}; see {PREPARE}")
        for path in output.iterdir():
            path.rename(work / path.name)
        output.rmdir()
        shutil.rmtree(scratch)
        _add_small_files(folder, work)
        write_json(work / CONFIG, npu_config(read_json(work / CONFIG), mode=chosen.name))
        notes = {**read_json(folder / NOTES), "mode": chosen.name, "finished_by": words[1:], "next": []}
        write_json(work / NOTES, notes)
    return made


def _run(words: list[str], scratch: Path, tell: Tell) -> None:
    """Run the tool in a folder of its own, as it leaves caches where it stands; ValueError with its last line."""
    last, count = "", 0
    options: dict[str, Any] = {"text": True, "encoding": "utf-8", "errors": "replace", "cwd": scratch}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
        try:
            for line in process.stdout or ():
                count, last = count + 1, line.strip() or last
                tell(Progress(TOOL, count, 0, last))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ValueError(
            f"{TOOL} failed with exit code {process.returncode}: {last or 'it said nothing'}; see {PREPARE}"
        )


def _add_small_files(folder: Path, work: Path) -> None:
    """Tokenizer and chat template, where the tool did not take them along."""
    for file in sorted(folder.iterdir()):
        small = file.is_file() and file.suffix in _SMALL and file.name not in _OWN_FILES
        if small and not (work / file.name).exists():
            shutil.copy(file, work / file.name)
