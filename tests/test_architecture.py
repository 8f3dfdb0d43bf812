"""The house keeps its plan: imports run one way, libraries have doors, the core knows nothing of tuning.

The checks take the folder that holds the packages and return violations, one readable line each, so that the
tests at the end can show on a spoilt copy that every check is able to fail.
"""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hdml_core", "studies", "cluster", "dashboards")

# From the ground up; a module may import what stands below it. Each name is a room with its submodules:
# within a room imports are free, between rooms of a floor there are none. In "name.*" each module is a room.
FLOORS = (
    ("hdml_core.notation", "hdml_core.errors", "hdml_core.whole"),
    ("hdml_core.library_losses", "hdml_core.linear_image"),
    ("hdml_core.config",),
    (
        "hdml_core.datasets",
        "hdml_core.sampling",
        "hdml_core.images",
        "hdml_core.networks",
        "hdml_core.augmentor",
        "hdml_core.metric_losses",
        "hdml_core.retrieval",
    ),
    ("hdml_core.synthesis",),
    ("hdml_core.methods",),
    ("hdml_core.frozen",),
    ("hdml_core.training",),
    ("hdml_core.checkpoint", "hdml_core.parallel", "hdml_core.fused"),
    ("studies.machinery",),
    ("studies.*", "cluster", "dashboards"),
)

# Who may import a library; everyone may import a library that is not named here.
DOORS = {
    "torch": ("hdml_core", "studies.machinery"),
    "ray": (
        "studies.machinery.driver",
        "studies.machinery.resources",
        "studies.machinery.search",
        "studies.machinery.worker",
        "studies.machinery.store",
        "studies.machinery.postmortem",
        "studies.machinery.ranks",
        "cluster.check",
        "cluster.doctor",
    ),
    "mlflow": ("studies.machinery.experiment", "dashboards.runs", "cluster.doctor"),
    "optuna": (
        "studies.machinery.space",
        "studies.machinery.samplers",
        "studies.machinery.storage",
        "studies.machinery.ledger",
    ),
    "pytorch_metric_learning": ("hdml_core.library_losses",),
}

# Dashboards read the tracker, and share nothing with the machinery but the names of things and what a mean is worth.
READERS = {"dashboards": ("dashboards", "studies.machinery.records", "studies.machinery.intervals")}

# What must not come along when these are imported, however indirectly.
FREE_OF = {
    ("hdml_core",): ("ray", "optuna", "mlflow", "pytorch_metric_learning"),
    ("studies.machinery.records", "studies.machinery.intervals"): ("torch", "ray", "optuna", "mlflow"),
}


def inside(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module of every package."""
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    dotted = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
    return {name.removesuffix(".__init__"): file for name, file in zip(dotted, files, strict=True)}


def imports(root: Path) -> Iterator[tuple[str, str, str]]:
    """(place, importing module, imported module) of every import statement, wherever it stands."""
    known = modules(root)
    for module, file in known.items():
        for node in ast.walk(ast.parse(file.read_text(), file.name)):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                source = resolve_name("." * node.level + (node.module or ""), package)
                inner = [f"{source}.{alias.name}" for alias in node.names]
                targets = [name if name in known else source for name in inner]
            else:
                continue
            for target in dict.fromkeys(targets):
                yield f"{file.relative_to(root)}:{node.lineno}", module, target


def floor_and_room(module: str) -> tuple[int, str] | None:
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            if room.endswith(".*") and module.startswith(room[:-1]):
                return floor, module
            if inside(module, (room,)):
                return floor, room
    return None


def homeless_modules(root: Path) -> list[str]:
    """A package's own `__init__` needs no floor: `climbing_imports` lets it import nothing of the project."""
    return [
        f"{file.relative_to(root)} stands on no floor: name {module} in FLOORS"
        for module, file in modules(root).items()
        if module not in PACKAGES and floor_and_room(module) is None
    ]


def climbing_imports(root: Path) -> list[str]:
    found = []
    for place, module, target in imports(root):
        theirs = floor_and_room(target)
        if theirs is None:
            continue
        ours = floor_and_room(module) or (-1, module)
        if theirs[0] > ours[0]:
            found.append(f"{place}: {module} imports {target}, which stands above it")
        elif theirs[0] == ours[0] and theirs[1] != ours[1]:
            found.append(f"{place}: {module} imports {target}, its neighbour on the same floor")
    return found


def doors_passed_by(root: Path) -> list[str]:
    return [
        f"{place}: {module} imports {target}, whose doors are {', '.join(DOORS[library])}"
        for place, module, target in imports(root)
        if (library := target.partition(".")[0]) in DOORS and not inside(module, DOORS[library])
    ]


def readers_that_know_too_much(root: Path) -> list[str]:
    return [
        f"{place}: {module} imports {target}; of this project {reader} may import {', '.join(allowed)}"
        for place, module, target in imports(root)
        for reader, allowed in READERS.items()
        if inside(module, (reader,)) and inside(target, PACKAGES) and not inside(target, allowed)
    ]


def libraries_come_along(root: Path) -> list[str]:
    """Import all that is in the rooms of a row of FREE_OF in a fresh interpreter and see what else was loaded."""
    found = []
    for rooms, libraries in FREE_OF.items():
        script = f"""
import importlib, sys
sys.path.insert(0, {str(root)!r})
for name in {[module for module in modules(root) if inside(module, rooms)]!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(root)!r}), module.__file__
print(*sorted(set({libraries!r}) & set(sys.modules)))
"""
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
        assert result.returncode == 0, result.stderr
        found += [f"importing {' and '.join(rooms)} imports {library}" for library in result.stdout.split()]
    return found


CHECKS = (homeless_modules, climbing_imports, doors_passed_by, readers_that_know_too_much, libraries_come_along)


@pytest.mark.parametrize("check", CHECKS)
def test_the_house_keeps_its_plan(check):
    assert check(ROOT) == []


@pytest.fixture
def copy(tmp_path):
    """A copy of the packages, to be spoilt."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


SPOILT = [
    (homeless_modules, "hdml_core/helpers.py", "", "stands on no floor"),
    (climbing_imports, "hdml_core/config.py", "from hdml_core.training import fit", "stands above it"),
    (climbing_imports, "hdml_core/config.py", "from hdml_core import training", "stands above it"),
    (climbing_imports, "hdml_core/config.py", "from .training import fit", "stands above it"),
    (climbing_imports, "hdml_core/__init__.py", "import hdml_core.notation", "stands above it"),
    (climbing_imports, "hdml_core/images.py", "import hdml_core.networks", "its neighbour"),
    (
        climbing_imports,
        "hdml_core/notation.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hdml_core.config import Config",
        "stands above it",
    ),
    (climbing_imports, "studies/one.py", "def run():\n    import studies.two", "its neighbour"),
    (climbing_imports, "studies/machinery/one.py", "from dashboards import pages", "stands above it"),
    (doors_passed_by, "studies/one.py", "from ray import tune", "whose doors are"),
    (doors_passed_by, "hdml_core/training.py", "import mlflow.tracking", "whose doors are"),
    (doors_passed_by, "dashboards/pages.py", "import torch", "whose doors are"),
    (readers_that_know_too_much, "dashboards/pages.py", "from hdml_core.config import Config", "may import"),
    (libraries_come_along, "hdml_core/notation.py", "import mlflow", "hdml_core imports mlflow"),
    (
        libraries_come_along,
        "studies/machinery/__init__.py",
        "import mlflow",
        "records and studies.machinery.intervals imports mlflow",
    ),
]


@pytest.mark.parametrize(("check", "file", "line", "complaint"), SPOILT)
def test_each_check_can_fail(copy, check, file, line, complaint):
    (copy / "mlflow.py").touch()  # stands in for the real one, which takes seconds to import
    (copy / "studies/two.py").touch()
    before = check(copy)
    with (copy / file).open("a") as spoilt:
        spoilt.write(f"\n{line}\n")
    new = [violation for violation in check(copy) if violation not in before]
    assert len(new) == 1
    assert complaint in new[0]
