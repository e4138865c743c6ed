"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd in a folder, on free ports."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
# Debian puts daemons where only root's login looks.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONF = """
ClusterName=drill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={slurmd_timeout}
KillWait=5
OverTimeLimit=0
MinJobAge=3600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    absent = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "slurmd runs as root only"


class Cluster:
    """The running cluster.

    Args:
        folder: Where its files lie; a short path, because it holds a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration and start all daemons."""
        (self.folder / "state").mkdir(mode=0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        text = CONF.format(folder=self.folder, host=host, ports=_free_ports(3), slurmd_timeout=20)
        (self.folder / "slurm.conf").write_text(text)
        names = ("socket", "key-file", "pid-file", "log-file", "seed-file")
        ends = ("socket", "key", "pid", "log", "seed")
        options = [f"--{name}={self.folder}/munge.{end}" for name, end in zip(names, ends, strict=True)]
        self._spawn("munged", "--foreground", "--force", *options)
        wait_for(lambda: (self.folder / "munge.socket").exists(), seconds=20, what="munged")
        self._spawn("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", seconds=60, what="idle nodes")

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._spawn("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str, job: str) -> None:
        """Kill a node's daemon, the step managers of a job on it and their tasks with -9."""
        process = self._processes.pop(node)
        process.kill()
        process.wait()
        for pid in self.tasks(node, job):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def tasks(self, node: str, job: str) -> list[int]:
        """Processes of a job's steps on a node, their managers first."""
        wanted = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_JOB_ID={job}".encode()}
        found: dict[int, int] = {}  # process -> parent
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if wanted <= set((path / "environ").read_bytes().split(b"\0")):
                    found[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:  # it has ended
                continue
        managers = {
            parent
            for parent in set(found.values()) - set(found)
            if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd")
        }
        return [*managers, *found]

    def call(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a command of SLURM; returns what it prints, or what it says where it fails."""
        done = subprocess.run(
            command,
            env={**self.environment, **variables},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return (done.stdout if done.returncode == 0 else f"failed: {done.stderr}").strip()

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        words = self.call("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """End all jobs and daemons."""
        self.call("scancel", "--full", "--signal=KILL", "--user=root")
        for process in reversed(self._processes.values()):
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _spawn(self, *command: str, name: str | None = None) -> None:
        with (self.folder / f"{name or command[0]}.out").open("ab") as log:
            self._processes[name or command[0]] = subprocess.Popen(
                command,
                env=self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,  # where a daemon that is killed may leave its memory
            )


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster and stop it at the end."""
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def wait_for(done: Callable[[], object], *, seconds: float, what: str) -> None:
    """Wait until something is true.

    Raises:
        TimeoutError: It is not, in time.
    """
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
