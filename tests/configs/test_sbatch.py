"""The batch scripts: each asks for what its cluster file uses, and what it does with each exit status."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from alignvlm_pl.cli.slurm import REFUSED, UNEXPECTED
from alignvlm_pl.utils.stop_signals import EXIT_CODE

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CLUSTER = CONFIGS / "cluster"
SCRIPTS = {"submit": "slurm8x8", "submit-gpu1": "gpu1", "submit-node8": "node8", "submit-cpu": "cpu"}
"""Script -> cluster file."""


def _options(script: str) -> dict[str, str]:
    text = (CLUSTER / f"{script}.sbatch").read_text("utf-8")
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text, flags=re.MULTILINE))


def _size(cluster: str) -> tuple[str, int, int]:
    machine = yaml.safe_load((CLUSTER / f"{cluster}.yaml").read_text("utf-8"))
    return machine["accelerator"], machine["num_nodes"], machine["devices"]


def test_every_cluster_file_has_its_script() -> None:
    assert sorted(SCRIPTS) == sorted(path.stem for path in CLUSTER.glob("*.sbatch"))
    sizes = {path.stem: _size(path.stem) for path in CLUSTER.glob("*.yaml")}
    assert set(sizes.values()) == {sizes[cluster] for cluster in SCRIPTS.values()}, "one of the same size"


@pytest.mark.parametrize(("script", "cluster"), SCRIPTS.items())
def test_a_script_agrees_with_its_cluster_file(script: str, cluster: str) -> None:
    options, (accelerator, num_nodes, devices) = _options(script), _size(cluster)
    assert int(options["nodes"]) == num_nodes
    assert int(options["ntasks-per-node"]) == devices, "one task a GPU"
    assert int(options.get("gpus-per-node", "0")) == (devices if accelerator == "gpu" else 0)
    common = ("job-name", "time", "signal", "requeue", "open-mode", "output")
    assert [options[key] for key in common] == [_options("submit")[key] for key in common]
    text = (CLUSTER / f"{script}.sbatch").read_text("utf-8")
    assert f"{cluster}.yaml" in text
    code = re.sub(r"^#.*", "", text, flags=re.MULTILINE)
    assert "torchrun" not in re.sub(r"#.*", "", code)
    assert re.findall(r"/(?:home|work|scratch|data|mnt|users)\b", text) == [], "no personal path"
    assert script == "submit" or code.strip() == 'exec bash configs/cluster/submit.sbatch "$@"'


def _run(
    folder: Path, *arguments: str, status: int = 0, script: str = "submit", body: str = "", **variables: str
) -> tuple[int, list[str]]:
    """Run a script with stand-ins for SLURM's commands; returns its exit status and the commands it gave."""
    for name, lines in (("srun", f"{body}\nexit {status}"), ("scontrol", "")):
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> log\n{lines}\n')
        path.chmod(0o755)
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(CONFIGS)
    (folder / "log").write_text("")
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", **variables}
    done = subprocess.run(
        ["bash", str(CLUSTER / f"{script}.sbatch"), *arguments],
        env=environment,
        cwd=folder,
        timeout=20,
        check=False,
    )
    return done.returncode, (folder / "log").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_and_status_are_passed_on(script: str, tmp_path: Path) -> None:
    found = _run(tmp_path, "--config", "a b.yaml", status=1, script=script, SLURM_CPUS_PER_TASK="12")
    assert found == (1, ["srun --cpus-per-task=12 alignvlm fit --config a b.yaml"])


def test_compiled_kernels_are_cached_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    body = 'echo "$TRITON_CACHE_DIR $TORCHINDUCTOR_CACHE_DIR" > caches'
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for chosen in ({}, dict.fromkeys(names, "/chosen")):
        _run(tmp_path, body=body, TMPDIR="/node", USER="ada", **chosen)
        found = (tmp_path / "caches").read_text().split()
        assert found == (["/chosen"] * 2 if chosen else ["/node/alignvlm-ada/triton", "/node/alignvlm-ada/inductor"])


@pytest.mark.parametrize("status", [0, 1, 2, 127, REFUSED, EXIT_CODE, UNEXPECTED, 134, 137, 138, 255])
def test_what_goes_back_to_the_queue(status: int, tmp_path: Path) -> None:
    requeues = status in (EXIT_CODE, UNEXPECTED, 134, 137, 138, 255)
    code, commands = _run(tmp_path, status=status)
    assert code == status
    assert commands[1:] == (["scontrol requeue 17"] if requeues else [])


def test_failures_in_a_row_end_and_a_clean_stop_between_them_counts_anew(tmp_path: Path) -> None:
    codes = [137, 70, EXIT_CODE, 137, 137, 255, 137]
    requeued = [len(_run(tmp_path, status=code)[1]) == 2 for code in codes]
    assert requeued == [True, True, True, True, True, True, False]
    assert len((tmp_path / "logs" / "failures-17").read_text().splitlines()) == 4


def test_of_an_array_one_task_goes_back_with_its_own_folder(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"}
    code, commands = _run(tmp_path, "--run_dir=runs/%a", "--seed_everything=%a", status=EXIT_CODE, **array)
    assert code == EXIT_CODE
    assert commands == [
        "srun --cpus-per-task=1 alignvlm fit --run_dir=runs/3 --seed_everything=3",
        "scontrol requeue 16_3",
    ]


@pytest.mark.parametrize("own", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}])
def test_memory_of_batches_of_other_lengths_is_not_lost(own: dict[str, str], tmp_path: Path) -> None:
    body = 'echo "$PYTORCH_CUDA_ALLOC_CONF $PYTORCH_ALLOC_CONF" > found'
    _run(tmp_path, "--config=x", body=body, **own)
    expected = own.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert (tmp_path / "found").read_text().split() == [expected, expected]


def test_tasks_of_an_array_may_not_share_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"}
    assert _run(tmp_path, "--run_dir=runs/one", **array) == (2, [])
    assert capfd.readouterr().err == (
        "error: the tasks of an array need a run folder each: put %a into the arguments, as in --run_dir runs/%a\n"
    )
