"""setup.cfg and pins against what is on disk: a forgotten subpackage or an unpinned dependency fails here."""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("alignvlm_pl", "callbacks", "datamodules")


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def _lines(text: str) -> list[str]:
    return [line for line in (raw.split("#")[0].strip() for raw in text.splitlines()) if line]


def _on_disk() -> set[str]:
    """Name every folder that holds Python code or configurations the way setup.cfg names packages."""
    found = {".".join(path.parent.relative_to(ROOT).parts) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    configs = {path.parent.relative_to(ROOT).parts for path in (ROOT / "configs").rglob("*.yaml")}
    return found | {".".join(("alignvlm_pl", *parts)) for parts in configs}


def test_packages_listed_by_name_are_those_on_disk(setup_cfg: configparser.ConfigParser) -> None:
    listed = _lines(setup_cfg["options"]["packages"])
    assert sorted(listed) == listed, "keep the list in order"
    assert set(listed) == _on_disk()


def test_every_code_folder_has_an_init() -> None:
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_no_top_level_module_is_installed(setup_cfg: configparser.ConfigParser) -> None:
    assert _lines(setup_cfg["options"]["py_modules"]) == []


def _canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~!; ]", requirement, maxsplit=1)[0]).lower()


def test_every_dependency_is_pinned_exactly(setup_cfg: configparser.ConfigParser) -> None:
    pins = _lines((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+(; python_version (<|>=) \"3\.\d+\")?", pin)] == []
    extras = setup_cfg["options.extras_require"]
    wanted = _lines(setup_cfg["options"]["install_requires"])
    wanted += [line for lines in extras.values() for line in _lines(lines)]
    assert {_canonical(name) for name in wanted} - {_canonical(pin) for pin in pins} == set()


def test_a_pin_for_new_pythons_has_one_for_the_oldest() -> None:
    pins = _lines((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    split = {mark: {_canonical(pin) for pin in pins if mark in pin} for mark in (">= ", "< ")}
    assert split[">= "] == split["< "] != set()


def test_weights_are_pinned_exactly() -> None:
    weights = _lines((ROOT / "weights.txt").read_text(encoding="utf-8"))
    assert weights and all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in weights)
