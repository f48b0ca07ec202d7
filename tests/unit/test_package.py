"""Claims about imports: deepspeed stays in the engine, and the pure parts need only torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dat_ds

PACKAGE = Path(dat_ds.__file__).parent


def run(code: str) -> str:
    """Run ``code`` in a fresh interpreter; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_neither_needs_nor_imports_deepspeed():
    code = "import sys; sys.modules['deepspeed'] = None; import dat_ds; print(dat_ds.__version__)"
    assert run(code) == dat_ds.__version__


def test_the_pure_parts_import_neither_timm_nor_deepspeed_nor_transformers():
    heavy = ["timm", "deepspeed", "transformers", "torchvision", "sklearn"]
    code = (
        "import sys, dat_ds.attacks, dat_ds.objectives, dat_ds.compression, dat_ds.optim, "
        "dat_ds.config; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert run(code) == "[]"


def test_attacks_are_light_beside_torch():
    heavy = ["timm", "deepspeed", "transformers", "torchvision", "sklearn", "scipy", "matplotlib"]
    code = (
        "import sys, time, torch; known = set(sys.modules); began = time.process_time(); "
        "import dat_ds.attacks; took = time.process_time() - began; "
        f"print(took, [name for name in {heavy} if name in set(sys.modules) - known])"
    )
    took, loaded = run(code).split(maxsplit=1)
    assert loaded == "[]"
    assert float(took) < 1.0  # CPU seconds; about 0.2 on an idle machine


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importers(root: str) -> set[str]:
    """Folders of the package (or files at its top) with a file that imports ``root``."""
    return {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if any(name == root or name.startswith(root + ".") for name in imported(path))
    }


def test_only_the_engine_imports_deepspeed():
    assert importers("deepspeed") <= {"engine", "integrations"}
    assert "engine" in importers("deepspeed"), "the scan sees imports"


FLOORS = (
    {"errors", "kinds", "length", "patching", "processes", "progress", "traffic", "zero3"},
    {"casting", "commands", "contracts", "files", "method"},
    {"checkpoints"},
    {"attacks", "compression", "data", "models", "ranks"},
    {"objectives", "optim"},
    {"finetuning"},
    {"config", "minmax"},
    {"evaluation"},
    {"assembly", "presets"},
    {"engine", "integrations"},
    {"training"},
    {"export", "judge"},
    {"bench"},
    {"cli"},
)
"""Rooms of the package, ground floor first; a room imports from lower floors alone."""


def test_every_room_has_its_floor():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__pycache__"} == set().union(*FLOORS)


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_point_down_only(floor):
    below = set().union(*FLOORS[:floor])
    for room in FLOORS[floor]:
        folder = PACKAGE / room
        for path in folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{room}.py"]:
            ours = {name.split(".")[1] for name in imported(path) if name.startswith("dat_ds.")}
            assert ours <= {room, *below}, path


def test_nothing_below_the_command_line_runs_it_in_another_process_either():
    naming = [p for p in PACKAGE.rglob("*.py") if "dat_ds.cli" in p.read_text(encoding="utf-8")]
    assert {path.relative_to(PACKAGE).parts[0] for path in naming} == {"cli"}


def test_every_public_name_is_there():
    for name in set(dat_ds.__all__) - {"AdversarialEngine", "initialize"}:
        assert hasattr(dat_ds, name)
    assert issubclass(dat_ds.UserError, Exception)


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dat_ds' has no attribute 'initialise'"):
        _ = dat_ds.initialise


def test_the_version_is_one() -> None:
    root = Path(dat_ds.__file__).parents[1]
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {dat_ds.__version__}\n" in citation
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{dat_ds.__version__}]" in changes
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert 'version = { attr = "dat_ds.__version__" }' in project
    assert '\nversion = "' not in project
