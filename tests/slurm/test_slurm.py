"""The shipped batch script on a real SLURM: two nodes, gloo, and everything that takes a job off them."""

import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.drills.launch import FRESH, ROOT
from tests.drills.resume import history, lines
from tests.drills.stages import FOLDERS, compare, fit, write_recipe
from tests.slurm.cluster import PATH, Cluster, cluster, missing, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]
STEPS = 12


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    folder = tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)
    with folder as path, cluster(Path(path)) as started:
        yield started


class Checkout:
    """A folder to submit from: the shipped configs, `alignvlm` on the path, and three tiny stages."""

    def __init__(self, slurm: Cluster, root: Path) -> None:
        self.slurm, self.root = slurm, root
        (root / "configs").symlink_to(ROOT / "configs")
        (root / "logs").mkdir()
        command = root / "bin" / "alignvlm"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "cli.py"} "$@"\n')
        command.chmod(0o755)
        self.recipe = write_recipe(root, steps=STEPS)
        trainer = yaml.safe_load((root / "trainer.yaml").read_text())
        pace = {"class_path": "tests.drills.signaller.Pace", "init_args": {"seconds": 0.15}}
        trainer["callbacks"].append(pace)
        (root / "trainer.yaml").write_text(yaml.safe_dump(trainer))
        groups = {"model": "model", "trainer": "trainer", "stage": "first", "data": "first-data"}
        self.stage = [f"--{group}={root / name}.yaml" for group, name in groups.items()]
        # Without workers, which the recipe has: those who try them at signals are the tests of the recipe.
        self.stage += [*self.recipe[1:], "--data.init_args.num_workers=0"]

    def submit(self, *arguments: str, options: tuple[str, ...] = (), nodes: int = 2, **variables: str) -> str:
        """Submit the script; returns the job's number."""
        sizes = [f"--nodes={nodes}", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10", *options]
        words = [*arguments, f"--trainer.num_nodes={nodes}", "--trainer.strategy=ddp"]
        job = self.slurm.call(
            "sbatch", "--parsable", *sizes, "configs/cluster/submit-cpu.sbatch", *words,
            cwd=self.root, PATH=f"{self.root / 'bin'}:{PATH}", MASTER_ADDR="127.0.0.1", **variables,
        )  # fmt: skip
        assert job.isdigit(), job
        return job

    def log(self, job: str) -> str:
        """What the job has printed."""
        path = self.root / "logs" / f"alignvlm-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for_step(self, run: str, step: int) -> None:
        """Wait until all ranks there are have written a step down."""
        wait_for(lambda: _last_step(self.root / run) >= step, seconds=180, what=f"step {step} of {run}")

    def wait(self, job: str, *, restarts: int | None = None, seconds: float = 250) -> dict[str, str]:
        """Wait until a job has ended, or runs for the n-th time again; returns what SLURM knows of it."""
        end, pending = time.monotonic() + seconds, 0
        while True:
            found = self.slurm.job(job)
            if found["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED"):
                return found
            if found["JobState"] == "RUNNING" and found["Restarts"] == str(restarts):
                return found
            # SLURM lets a requeued job wait two minutes, and refuses it within the second of its end.
            pending = pending + 1 if found["JobState"] == "PENDING" else 0
            if pending and pending % 4 == 0:
                self.slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")
            assert time.monotonic() < end, f"{found}\n{self.log(job)[-3000:]}"
            time.sleep(0.3)


def _last_step(run: Path) -> int:
    return max((line["step"] for line in lines(run)), default=0)


@pytest.fixture(scope="module", autouse=True)
def limited(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Checkout, str, Future[Any]]]:
    """A job that is longer than its limit, and its end; begun before all others, since most of it is waiting.

    SLURM looks at limits every half minute: the signal comes 25 to 55 seconds before the end of the one minute.
    """
    checkout = Checkout(slurm, tmp_path_factory.mktemp("limited"))
    options = ("--time=1", "--signal=USR1@25", "--nodelist=n1")
    job = checkout.submit(*checkout.stage, "--stage.max_steps=120", "--run_dir=run", options=options, nodes=1)

    def end() -> dict[str, str]:
        checkout.wait(job, restarts=1)
        slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # the rest at one go
        return checkout.wait(job)

    with ThreadPoolExecutor() as pool:
        yield checkout, job, pool.submit(end)


@pytest.fixture
def checkout(slurm: Cluster, tmp_path: Path) -> Checkout:
    return Checkout(slurm, tmp_path)


def test_a_preempted_job_trains_what_an_unbroken_run_trains(checkout: Checkout) -> None:
    folders = FOLDERS if FRESH in os.environ else FOLDERS[1:2]
    moments = [random.randrange(1, STEPS - 4) for _ in folders]
    job = checkout.submit(*checkout.recipe, "--run_dir=broken")
    for number, (folder, step) in enumerate(zip(folders, moments, strict=True)):
        checkout.wait(job, restarts=number)
        checkout.wait_for_step(f"broken/{folder}", step)
        assert checkout.slurm.call("scancel", "--signal=USR1", job) == ""
    done = checkout.wait(job)
    output = checkout.log(job)
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("COMPLETED", "0:0", str(len(moments))), output[
        -3000:
    ]
    assert output.count("asked to stop by SIGUSR1: left after step") == len(moments), moments
    assert "Traceback" not in output
    whole = fit(checkout.root / "whole", checkout.recipe, world=2)
    assert whole.returncode == 0, whole.output[-3000:]
    assert compare(checkout.root / "broken", checkout.root / "whole") == 3 * STEPS * 2


def test_a_killed_node_costs_the_steps_since_the_last_checkpoint(checkout: Checkout) -> None:
    job = checkout.submit(*checkout.stage, "--run_dir=run", "--checkpoint_every_n_steps=2", SLURM_WAIT="5")
    checkout.wait_for_step("run", 5)
    checkout.slurm.kill_node("n2", job)
    time.sleep(1)
    checkout.slurm.start_node("n2")
    done = checkout.wait(job)
    output = checkout.log(job)
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("COMPLETED", "0:0", "1"), output[-3000:]
    assert len(history(checkout.root / "run")) == 2 * STEPS, "what was trained twice was the same"
    assert 2 * STEPS < len(lines(checkout.root / "run")) <= 2 * (STEPS + 2)


def test_of_an_array_the_preempted_task_alone_goes_back(checkout: Checkout) -> None:
    job = checkout.submit(
        *checkout.stage, "--run_dir=run-%a", "--seed_everything=%a", options=("--array=0-1",), nodes=1
    )
    checkout.wait_for_step("run-1", 2)  # the last task has the array's own number
    checkout.slurm.call("scancel", "--signal=USR1", f"{job}_1")
    for task in ("0", "1"):
        done = checkout.wait(f"{job}_{task}")
        assert (done["JobState"], done["Restarts"]) == ("COMPLETED", task), checkout.log(done["JobId"])[-3000:]
    weights = [(checkout.root / f"run-{task}/hf/model.safetensors").read_bytes() for task in (0, 1)]
    assert weights[0] != weights[1]
    assert not (checkout.root / "run-%a").exists()


def test_other_nodes_than_the_config_s_are_refused_before_the_first_step(checkout: Checkout) -> None:
    job = checkout.submit(*checkout.stage, "--run_dir=run", options=("--nodes=1", "--ntasks-per-node=2"))
    done = checkout.wait(job)
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("FAILED", "200:0", "0")
    assert re.findall("^error: .*", checkout.log(job), flags=re.MULTILINE) == 2 * [
        "error: SLURM started 1 node(s) x 2 tasks, the config has trainer.num_nodes=2 x trainer.devices=1; "
        "use sbatch --nodes=2 --ntasks-per-node=1, or --trainer.num_nodes=1 --trainer.devices=2"
    ]
    assert not (checkout.root / "run/checkpoints").exists()


def test_a_time_limit_sends_the_job_back_by_itself(limited: tuple[Checkout, str, Future[Any]]) -> None:
    checkout, job, end = limited
    done, output = end.result(), checkout.log(job)
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("COMPLETED", "0:0", "1"), output[-3000:]
    assert output.count("asked to stop by SIGUSR1") == 1
    assert len(lines(checkout.root / "run")) == len(history(checkout.root / "run")) == 2 * 120
