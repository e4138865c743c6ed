"""Rules of the house that no linter knows: layout, sizes, the test tree, imports that stay light."""

import ast
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("alignvlm_pl", "callbacks", "datamodules")
HEAVY = ("lightning", "torch", "transformers")


def _sources() -> list[Path]:
    return [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def test_top_levels_hold_folders() -> None:
    """A new thing goes into a folder of its kind: CONTRIBUTING.md, "Layout"."""
    for package in ("alignvlm_pl", "datamodules"):
        modules = [path.stem for path in (ROOT / package).glob("*.py") if not path.stem.startswith("__")]
        assert len(modules) <= 5, modules


def test_functions_stay_short() -> None:
    long = {}
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1 if ast.get_docstring(node) is not None and len(node.body) > 1 else 0]
                lines = node.end_lineno - first.lineno + 1  # without arguments and docstring
                if lines > 60:
                    long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert long == {}


def test_test_tree_shadows_no_package() -> None:
    # With an __init__.py in tests/callbacks pytest would import that folder as `callbacks`.
    assert [str(path) for path in (ROOT / "tests").rglob("__init__.py")] == []
    assert [name for name in PACKAGES if (ROOT / "tests" / name).exists()] == []
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    "module",
    [
        "alignvlm_pl",
        "alignvlm_pl.errors",
        "alignvlm_pl.preprocessing.imaging",
        "alignvlm_pl.metrics",
        "alignvlm_pl.utils.installation",
        "alignvlm_pl.preprocessing.tiling",
        "callbacks",
        "datamodules",
        "datamodules.prepare",
        *(f"datamodules.prepare.{kind}" for kind in ("cc12m", "bigdocs", "docdownstream", "llava", "vcr", "folder")),
    ],
)
def test_import_stays_light(module: str) -> None:
    program = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", PACKAGES)
def test_lazy_names_exist(package: str) -> None:
    module = import_module(package)
    for name in module.__all__:
        getattr(module, name)
    with pytest.raises(AttributeError, match=f"^module '{package}' has no attribute 'no_such_name'$"):
        _ = module.no_such_name


@pytest.mark.slow
def test_import_rules_are_kept() -> None:
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout
