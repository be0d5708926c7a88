"""The architecture as tests: who may import whom, what a module must not do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "denoise_core"

# A module imports only from lower floors or, without a circle, from its own.
FLOORS = [
    {"errors", "config"},
    {"tiling", "patches", "noise", "metrics", "storage", "images", "models", "devices", "presets"}
    | {"idx", "pairs", "space", "trials", "self_supervised"},
    {"checkpoints", "curves", "keras_files", "worklist", "results", "lock"},
    {
        "choice",
        "denoiser",
        "export",
        "training_data",
        "training",
        "assemble",
        "report",
        "samples",
        "evaluation",
    },
    {"benchmarks", "pipelines"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

MODULES = sorted(path for path in CORE.rglob("*.py"))
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def unit(path: Path) -> str:
    """The module or package of denoise_core that a file belongs to: `tiling`, `models`, ..."""
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imports(path: Path, *, at_import: bool = False) -> Iterator[str]:
    """Full names of the modules that a file imports; `at_import` leaves out those in functions."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if at_import and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide their floor"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(path: Path, *, at_import: bool = False) -> set[str]:
    return {name.partition(".")[0] for name in imports(path, at_import=at_import)}


def used_units(path: Path) -> set[str]:
    parts = [name.split(".") for name in imports(path) if name.startswith("denoise_core.")]
    return {part[1] for part in parts if part[1] in FLOOR} - {unit(path)}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_module_has_a_floor():
    units = {unit(path) for path in MODULES} - {"__init__"}
    assert units - set(FLOOR) == set(), "give the new module a floor in tests/test_floors.py"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_its_own_and_lower_floors(path):
    if unit(path) == "__init__":
        assert used_units(path) == set()
        return
    above = {name for name in used_units(path) if FLOOR[name] > FLOOR[unit(path)]}
    assert above == set()


def test_no_circle_of_modules_on_one_floor():
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph.setdefault(unit(path), set()).update(used_units(path))
    free: set[str] = set()
    while ready := {name for name, needs in graph.items() if needs <= free} - free:
        free |= ready
    assert set(graph) - free == set()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_core_imports_no_job_and_no_command_line(path):
    assert packages(path) & {"jobs", "tests", "click", "argparse"} == set()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_pipelines_import_ray(path):
    assert unit(path) == "pipelines" or "ray" not in packages(path)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").rglob("*.py")), ids=name_of)
def test_of_the_jobs_only_one_file_imports_ray_and_none_computes(path):
    assert path.name == "_ray.py" or "ray" not in packages(path)
    assert packages(path) & {"tensorflow", "keras"} == set()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_tensorflow_is_imported_in_functions_only(path):
    assert packages(path, at_import=True) & {"tensorflow", "keras"} == set()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_pickled_by_us(path):
    assert packages(path) & PICKLES == set()
    allowed = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle"
    ]
    assert all(isinstance(n.value, ast.Constant) and n.value.value is False for n in allowed)


def loaded_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_importing_the_pipelines_does_not_import_tensorflow():
    names = {path.stem for path in (CORE / "pipelines").glob("*.py")} - {"__init__"}
    assert {"denoise", "train"} <= names
    loaded = loaded_after("\n".join(f"import denoise_core.pipelines.{name}" for name in names))
    assert "ray" in loaded
    assert loaded & {"tensorflow", "keras", "jax", "torch"} == set()


def test_importing_the_denoiser_and_the_trainer_imports_neither_ray_nor_tensorflow():
    loaded = loaded_after("import denoise_core.denoiser, denoise_core.training")
    assert loaded & {"ray", "tensorflow", "keras"} == set()


def test_the_readme_lists_every_file():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md yet")
    listed = set(rows_of(readme.read_text()))
    files = [path for path in [*MODULES, *(ROOT / "jobs").glob("*.py")] if path.stem != "__init__"]
    own = {name_of(path) for path in files} & listed
    # A folder has one row for all its files, or one for each of them.
    split = {name.rpartition("/")[0] for name in own}
    whole = {name.rstrip("/") for name in listed if name.endswith("/")} - split
    missing = {name_of(path) for path in files if name_of(path.parent) not in whole} - own
    assert missing == set()


def rows_of(text: str) -> Iterator[str]:
    """Paths that the README's table lists; of neighbours in one row the first names the folder."""
    for cell in re.findall(r"^\| (`(?:jobs|denoise_core)/[^|]*)\|", text, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cell)
        yield first
        yield from (f"{first.rpartition('/')[0]}/{name}" for name in others)


def test_the_readme_lists_no_file_that_is_gone():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md yet")
    named = list(rows_of(readme.read_text()))
    assert "denoise_core/errors.py" in named
    assert [name for name in named if not (ROOT / name).exists()] == []
