"""The wheel: it holds exactly our three packages and the configurations, and works far from the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("alignvlm_pl", "callbacks", "datamodules")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy, so that neither an old `build/` gets in nor a new one stays in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in (*PACKAGES, "configs", "tests", "perf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "MANIFEST.in", "README.md", "cli.py", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into a folder; its dependencies come from the running environment."""
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def _run(arguments: list[str], *, site: Path, folder: Path) -> str:
    """Run Python in another folder with the installed wheel before everything else on the path."""
    # -P (3.11 on) keeps the working directory off the path, as the console script does.
    environment = {
        "PYTHONPATH": str(site),
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_exactly_our_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)


def test_wheel_holds_every_source_and_config(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    sources = {str(path.relative_to(ROOT)) for path in code}
    shipped = [path for kind in ("yaml", "sbatch") for path in (ROOT / "configs").rglob(f"*.{kind}")]
    configs = {f"alignvlm_pl/{path.relative_to(ROOT)}" for path in shipped}
    assert configs
    assert (sources | configs | {"alignvlm_pl/py.typed"}) - names == set()


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    entry_points = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "\nLicense: Apache-2.0\n" in metadata
    assert "\nRequires-Python: <3.13,>=3.10\n" in metadata
    assert "alignvlm = alignvlm_pl.cli:main" in entry_points


def test_installed_wheel_finds_its_configs_and_itself(site: Path, tmp_path: Path) -> None:
    program = (
        "import alignvlm_pl.utils.installation as own, callbacks, datamodules; "
        "own.check_top_level_packages(); print(own.configs_dir(), callbacks.__file__, datamodules.__file__, sep='\\n')"
    )
    printed = _run(["-c", program], site=site, folder=tmp_path).splitlines()
    assert printed == [
        str(site / "alignvlm_pl" / "configs"),
        str(site / "callbacks" / "__init__.py"),
        str(site / "datamodules" / "__init__.py"),
    ]


def test_installed_command_line_helps_from_another_folder(site: Path, tmp_path: Path) -> None:
    for command in (["-m", "alignvlm_pl", "--help"], [str(site / "bin" / "alignvlm"), "--help"]):
        assert "fit" in _run(command, site=site, folder=tmp_path)
