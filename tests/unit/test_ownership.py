"""A foreign `callbacks` or `datamodules` is refused, with its file and its owners."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from alignvlm_pl.utils import installation
from alignvlm_pl.utils.installation import check_top_level_packages


@pytest.fixture(params=installation.TOP_LEVEL_PACKAGES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package name that will be imported anew within the test, and as before after it."""
    for module in [m for m in sys.modules if m == request.param or m.startswith(f"{request.param}.")]:
        monkeypatch.delitem(sys.modules, module)
    return request.param


@pytest.fixture(autouse=True)
def _forget_what_the_test_imported(monkeypatch: pytest.MonkeyPatch):
    yield
    for name in installation.TOP_LEVEL_PACKAGES:
        module = sys.modules.get(name)
        if module is not None and getattr(module, "__distribution__", None) != installation.DISTRIBUTION:
            del sys.modules[name]


def _foreign(folder: Path, name: str, text: str = "") -> Path:
    """Write a package of this name, and the metadata of the distribution `stranger` that installed it."""
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text(text)
    info = folder / "stranger-9.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 9.1\n")
    (info / "top_level.txt").write_text(f"{name}\n")
    return package


def test_our_own_packages_pass() -> None:
    check_top_level_packages()


@pytest.mark.parametrize("text", ["", "__distribution__ = 'stranger'\n"])
def test_foreign_package_is_refused_with_file_and_owner(name, text, tmp_path, monkeypatch) -> None:
    package = _foreign(tmp_path, name, text)
    monkeypatch.syspath_prepend(str(tmp_path))
    place = re.escape(str(package / "__init__.py"))
    message = f"'{name}' comes from {place}, not from alignvlm_pl .*stranger 9.1.*uninstall"
    with pytest.raises(ImportError, match=message) as caught:
        check_top_level_packages()
    assert caught.value.name == name


def test_folder_without_init_is_refused_with_its_place(name, tmp_path, monkeypatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "editable" not in repr(f)])
    with pytest.raises(ImportError, match=rf"'{name}' comes from .*{re.escape(str(tmp_path / name))}"):
        _check_only(name, monkeypatch)


def test_missing_package_says_reinstall(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "editable" not in repr(f)])
    with pytest.raises(ImportError, match=rf"'{name}' of alignvlm_pl is not installed .*reinstall"):
        _check_only(name, monkeypatch)


def test_missing_import_inside_a_package_is_not_taken_for_a_missing_package(name, tmp_path, monkeypatch) -> None:
    _foreign(tmp_path, name, "import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        check_top_level_packages()


def _check_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "TOP_LEVEL_PACKAGES", (name,))
    check_top_level_packages()


def test_the_command_works_in_a_project_with_folders_of_these_names(tmp_path) -> None:
    """As in many Lightning projects; `alignvlm` is a script in another folder, and the working directory comes last."""
    for name in installation.TOP_LEVEL_PACKAGES:
        (tmp_path / "project" / name).mkdir(parents=True)
        (tmp_path / "project" / name / "__init__.py").write_text("raise RuntimeError('the project of a user')\n")
    (tmp_path / "alignvlm").write_text("from alignvlm_pl.cli import main\nraise SystemExit(main())\n")
    words = [sys.executable, str(tmp_path / "alignvlm"), "shards", "verify", "nowhere"]
    done = subprocess.run(words, cwd=tmp_path / "project", capture_output=True, text=True, timeout=100, check=False)
    assert "the project of a user" not in done.stderr
    assert done.stderr.startswith("error: nowhere"), done.stderr
