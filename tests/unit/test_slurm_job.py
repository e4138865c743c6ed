"""What a run makes of SLURM's variables."""

import pytest

from alignvlm_pl.cli.slurm import (
    REFUSED,
    UNEXPECTED,
    check_allocation,
    cluster_plugins,
    exit_status_for_srun,
    in_slurm,
)
from alignvlm_pl.errors import ConfigError, DataError

JOB = {
    "SLURM_JOB_NAME": "alignvlm",
    "SLURM_NTASKS": "16",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


def test_the_config_s_nodes_and_tasks_are_let_through():
    check_allocation(JOB, num_nodes=2, devices=8)
    check_allocation({}, num_nodes=1, devices=3)


def test_torchrun_and_interactive_shells_are_left_alone():
    assert in_slurm(JOB)
    assert not in_slurm({**JOB, "SLURM_JOB_NAME": "interactive"})
    assert not in_slurm({**JOB, "TORCHELASTIC_RUN_ID": "x"})


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        (
            {},
            (1, 8),
            "SLURM started 2 node(s) x 8 tasks, the config has trainer.num_nodes=1 x trainer.devices=8; use sbatch "
            "--nodes=1 --ntasks-per-node=8, or --trainer.num_nodes=2 --trainer.devices=8",
        ),
        (
            {"SLURM_NTASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"},
            (2, 2),
            "SLURM started 2 node(s) x 2+1 tasks, the config has trainer.num_nodes=2 x trainer.devices=2; use sbatch "
            "--nodes=2 --ntasks-per-node=2",
        ),
        (
            {"SLURM_STEP_ID": None},
            (2, 8),
            "the SLURM job has 16 tasks, but this is its batch script and not one of them; start the command with "
            "srun (configs/cluster/submit.sbatch does)",
        ),
        (
            {"SLURM_NTASKS_PER_NODE": None},
            (2, 8),
            "SLURM was asked for --ntasks=16; use sbatch --nodes=2 --ntasks-per-node=8",
        ),
    ],
)
def test_another_allocation_is_refused_with_both_values(changes, size, message):
    job = {key: value for key, value in {**JOB, **changes}.items() if value is not None}
    with pytest.raises(ConfigError) as refused:
        check_allocation(job, num_nodes=size[0], devices=size[1])
    assert str(refused.value) == message


def test_lightning_requeues_nothing(monkeypatch):
    assert cluster_plugins({}) == []
    for (
        name,
        value,
    ) in JOB.items():  # Lightning looks itself, and warns where there is an srun that was not used
        monkeypatch.setenv(name, value)
    (plugin,) = cluster_plugins(JOB)
    assert plugin.auto_requeue is False


def test_inside_a_job_errors_have_statuses_of_their_own(monkeypatch, capsys):
    def lost() -> int:
        raise RuntimeError("connection closed by peer")

    def damaged() -> int:
        raise DataError("shard")

    with pytest.raises(RuntimeError):
        exit_status_for_srun(lost)
    assert exit_status_for_srun(lambda: 1) == 1
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    assert exit_status_for_srun(lost) == UNEXPECTED
    assert "connection closed by peer" in capsys.readouterr().err
    assert [exit_status_for_srun(lambda status=status: status) for status in (0, 1, 2, 85)] == [
        0,
        REFUSED,
        REFUSED,
        85,
    ]
    assert exit_status_for_srun(damaged) == UNEXPECTED, "main() prints an error of the project and returns 1"
    assert UNEXPECTED < 128 + 9 < REFUSED, "srun reports the highest"
