"""The rules of the house, read from the sources: imports go one way, heavy libraries stay at home, files are small."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["recover", "export", "runtime", "profiles", "apps"]  # a room may import itself and those before it
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
MAX_LINES = 400

HOME = {
    "torch": "recover",
    "transformers": "recover",
    "peft": "recover",
    "accelerate": "recover",
    "huggingface_hub": "recover",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxruntime": "runtime",
    "onnxruntime_genai": "runtime",
    "typer": "apps",
    "rich": "apps",
    "fastapi": "apps",
    "uvicorn": "apps",
    "skimage": "profiles",
    "cv2": "profiles",
    "ray": "profiles",
}
# Only inside functions: converting a checkpoint needs the GenAI builder, which needs torch; adapters' files are written
# by the runtime that reads them; depth networks are traced by torch's own exporter.
MAY_INSIDE = {
    "export/skeleton.py": {"torch", "transformers", "peft", "huggingface_hub", "onnxruntime_genai"},
    "export/adapters.py": {"onnxruntime"},
    "export/vision.py": {"torch"},
}

LIGHT_RECOVER = [
    "allocate",
    "assets",
    "atomic",
    "cache",
    "contents",
    "cores",
    "depthdata",
    "depthfile",
    "depthfiles",
    "depthsample",
    "ggufheader",
    "hub",
    "interrupts",
    "kvformat",
    "likelihood",
    "memory",
    "packing",
    "placement",
    "prefixes",
    "progress",
    "raycast",
    "recipe",
    "rectified",
    "scenes",
    "scorerpool",
    "source",
    "texture",
    "upload",
]
HEAVY = ["torch", "transformers", "peft", "accelerate", "huggingface_hub", "onnx", "onnx_ir", "gguf", "skimage", "cv2"]


def imports(path: Path) -> Iterator[tuple[str, int, int, bool]]:
    """Yield (module, relative level, line, inside a function) of each import in a file."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, int, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, 0, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                yield module, child.level, child.lineno, inside
                if module == "rlkit":  # from rlkit import export
                    yield from ((f"rlkit.{alias.name}", 0, child.lineno, inside) for alias in child.names)
            yield from visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)


def faults(path: Path, room: str) -> Iterator[str]:
    """Yield what a file imports against the rules, one line each."""
    name = f"{room}/{path.name}"
    for module, level, line, inside in imports(path):
        top, *rest = module.split(".")
        excepted = inside and top in MAY_INSIDE.get(name, ())
        if level:
            yield f"{name}:{line} imports relatively"
        elif top in ROOMS:
            yield f"{name}:{line} imports {module} without rlkit in front"
        elif top == "rlkit" and rest and ROOMS.index(rest[0]) > ROOMS.index(room):
            yield f"{name}:{line} imports {module}, a room to its right"
        elif top in HOME and HOME[top] != room and not excepted:
            yield f"{name}:{line} imports {module}, whose home is {HOME[top]}/"


def modules(room: str) -> list[str]:
    return [f"rlkit.{room}.{path.stem}" for path in sorted((ROOT / room).glob("*.py")) if path.stem != "__init__"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way_and_heavy_libraries_stay_at_home(path: Path) -> None:
    assert list(faults(path, path.relative_to(ROOT).parts[0])) == []


@pytest.mark.parametrize(
    ("room", "name", "source", "fault"),
    [
        ("recover", "x.py", "import rlkit.apps.cli", "a room to its right"),
        ("recover", "x.py", "from rlkit import export", "a room to its right"),
        ("runtime", "x.py", "def f():\n    import torch", "whose home is recover/"),
        ("export", "build.py", "import torch", "whose home is recover/"),
        ("export", "plan.py", "def f():\n    import torch", "whose home is recover/"),
        ("apps", "x.py", "from recover import recipe", "without rlkit in front"),
        ("apps", "x.py", "from . import cli", "imports relatively"),
    ],
)
def test_the_rules_catch_what_they_should(tmp_path: Path, room: str, name: str, source: str, fault: str) -> None:
    (tmp_path / name).write_text(source)
    assert [fault in found for found in faults(tmp_path / name, room)] == [True]


def test_the_converter_may_import_torch_inside_its_functions(tmp_path: Path) -> None:
    (tmp_path / "skeleton.py").write_text(
        "def convert():\n    import torch\n    from onnxruntime_genai.models import builder\n"
    )
    assert list(faults(tmp_path / "skeleton.py", "export")) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_packages_listed_are_the_folders_there_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rooms = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    nested = sorted({path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).glob("*/**/*.py")})
    listed = project["tool"]["setuptools"]["packages"]
    assert rooms == sorted(ROOMS)
    assert sorted(listed) == sorted(f"rlkit.{'.'.join(path.parts)}" for path in [*map(Path, rooms), *nested])
    assert project["tool"]["mypy"]["packages"] == [name for name in listed if name.count(".") == 1]


def test_every_room_is_typed_and_importable() -> None:
    for room in ROOMS:
        assert (ROOT / room / "py.typed").is_file()
        docstring = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")))
        assert docstring and "\n" not in docstring


def test_base_install_imports_without_heavy_libraries() -> None:
    """What runs, serves, measures and forecasts works where torch and its kin are not installed."""
    light = [f"rlkit.recover.{name}" for name in LIGHT_RECOVER]
    wanted = light + [name for room in ("runtime", "profiles", "apps") for name in modules(room)]
    program = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
for name in {wanted!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
