"""A run inside a SLURM job: its nodes and tasks must be those of the config, and its exit status says what to do.

Lightning's requeueing is off: callbacks/preemption.py saves, configs/cluster/submit.sbatch requeues.
"""

import os
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError

_INTERACTIVE = ("bash", "interactive")
"""Names of jobs in which Lightning takes no notice of SLURM."""

_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK")
"""Variables of torchrun, MPI and LSF launchers."""

UNEXPECTED = 70
"""Exit status after a traceback, which may be a lost node's doing (CONTRACT: configs/cluster/submit.sbatch)."""

REFUSED = 200
"""Exit status after an error of the user's (CONTRACT: configs/cluster/submit.sbatch)."""


def in_slurm(environment: Mapping[str, str]) -> bool:
    """Whether Lightning will take ranks and addresses from SLURM: as it decides itself, torchrun's variables first."""
    elastic = "TORCHELASTIC_RUN_ID" in environment
    interactive = environment.get("SLURM_JOB_NAME") in _INTERACTIVE
    return "SLURM_NTASKS" in environment and not interactive and not elastic


def requeued(environment: Mapping[str, str]) -> bool:
    """Whether the job has run before: the command may then find its work done."""
    return in_slurm(environment) and restarts(environment) > 0


def restarts(environment: Mapping[str, str]) -> int:
    """How often SLURM has started the job again."""
    return int(environment.get("SLURM_RESTART_COUNT", "0"))


def is_first_rank(environment: Mapping[str, str]) -> bool:
    """Whether this process will be rank 0, as Lightning decides it, before there is a trainer."""
    for name in ["SLURM_PROCID"] if in_slurm(environment) else _RANKS:
        if name in environment:
            return environment[name] == "0"
    return all(environment.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


def check_allocation(environment: Mapping[str, str], *, num_nodes: int, devices: int) -> None:
    """Raise a ConfigError where SLURM has not started a task for each of `num_nodes` x `devices` by srun.

    Ranks would wait for others for ever.
    """
    if not in_slurm(environment):
        return
    tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", "1"))
    if tasks > 1 and "SLURM_STEP_ID" not in environment:
        raise ConfigError(
            f"the SLURM job has {tasks} tasks, but this is its batch script and not one of them; start the command "
            "with srun (configs/cluster/submit.sbatch does)"
        )
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))  # such as 2(x3),1
    per_node = [int(count) for count, times in found for _ in range(int(times or 1))] or [tasks // nodes] * nodes
    if per_node != [devices] * num_nodes:
        advice = f"sbatch --nodes={num_nodes} --ntasks-per-node={devices}"
        if len(set(per_node)) == 1:
            advice += f", or --trainer.num_nodes={nodes} --trainer.devices={per_node[0]}"
        started = "+".join(map(str, per_node if len(set(per_node)) > 1 else per_node[:1]))
        raise ConfigError(
            f"SLURM started {nodes} node(s) x {started} tasks, the config has trainer.num_nodes={num_nodes} x "
            f"trainer.devices={devices}; use {advice}"
        )
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
        raise ConfigError(
            f"SLURM was asked for --ntasks={tasks}; use sbatch --nodes={num_nodes} --ntasks-per-node={devices}"
        )


def cluster_plugins(environment: Mapping[str, str]) -> list[Any]:
    """Lightning's view of SLURM, without its requeueing; none outside of SLURM."""
    if not in_slurm(environment):
        return []
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)]


def exit_status_for_srun(run: Callable[[], int]) -> int:
    """Run a command; returns its exit status, inside a SLURM job one that the batch script can tell apart.

    srun reports the highest status of its tasks. An error of one rank's data ends the others with a traceback, or srun
    kills them (137): it must be above both.
    """
    if not in_slurm(os.environ):
        return run()
    try:
        status = run()
    except Exception:
        traceback.print_exc()
        return UNEXPECTED
    return REFUSED if status in (1, 2) else status
