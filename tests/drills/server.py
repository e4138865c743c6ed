"""Start Python programs from a process that has imported what they need: `python -m tests.drills.server`.

One JSON object a line on stdin: `cwd`, and `processes`: of each its `words` (a file and its arguments), `environment`
and `log`. All are forked, in one process group; the answers on stdout are the group's id, and at the end their exit
statuses. Nothing but imports has run here before: a program begins as a new interpreter does after its imports.
"""

import gc
import json
import logging
import multiprocessing.util
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NoReturn

from datamodules.loading.workers import start_server

PRELOADED = """
alignvlm_pl.cli.training alignvlm_pl.models.build alignvlm_pl.models.tiny alignvlm_pl.strategies.fsdp callbacks.outputs
datamodules.bigdocs datamodules.docdownstream lightning.pytorch.cli tensorboard.summary.writer.event_file_writer
torch.distributed.fsdp torch.utils.tensorboard transformers.models.llama.modeling_llama
transformers.models.siglip.modeling_siglip
""".split()
GRACE_SECONDS = 60
"""How long the other ranks may run on after one has failed; then they are killed, as torchrun does."""


def main() -> None:
    """Serve until stdin is closed."""
    # Lightning prints by itself where nobody has set up logging before its import, as the command line does.
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    for name in PRELOADED:
        import_module(name)
    logging.root.removeHandler(handler)
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        ranks: list[int] = []
        for process in request["processes"]:
            ranks.append(_fork(request, process, ranks[0] if ranks else 0))
        _answer(ranks[0])
        _answer(_wait(ranks))


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _fork(request: dict[str, Any], process: dict[str, Any], group: int) -> int:
    child = os.fork()
    # In both: neither may continue before it is done. A group of 0 is a new one.
    os.setpgid(child, group or child)
    if not child:
        _run(request, process)
    return child


def _run(request: dict[str, Any], process: dict[str, Any]) -> NoReturn:
    """Be the program; the interpreter ends with it, as it would have without a server."""
    os.chdir(request["cwd"])
    log = os.open(process["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(process["environment"])
    with _forked_workers():
        start_server()
    program, *_ = sys.argv = process["words"]
    sys.path[:0] = [os.path.dirname(program), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(program, run_name="__main__")
    raise SystemExit


@contextmanager
def _forked_workers() -> Iterator[None]:
    """Within the block, the server of a loader's workers is forked from this process, which has its imports, too."""
    spawn = multiprocessing.util.spawnv_passfds  # type: ignore[attr-defined]

    def fork(path: bytes, words: Sequence[Any], passed: Sequence[int]) -> int:
        code = str(words[-1])
        if "forkserver" not in code:
            return int(spawn(path, words, passed))
        child = os.fork()
        if not child:
            for number in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *passed}:
                with suppress(OSError):  # that of the listing itself
                    os.close(number)
            try:
                exec(code, {})
            finally:
                os._exit(0)  # not back into what started it, whose files are closed here
        return child

    multiprocessing.util.spawnv_passfds = fork  # type: ignore[attr-defined]
    try:
        yield
    finally:
        multiprocessing.util.spawnv_passfds = spawn  # type: ignore[attr-defined]


def _wait(ranks: list[int]) -> list[int]:
    """Wait for all processes; returns their exit statuses, negative for a signal."""
    ended: dict[int, int] = {}
    deadline = float("inf")
    while len(ended) < len(ranks):
        for child in set(ranks) - set(ended):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended[child] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS) if ended[child] else deadline
        if time.monotonic() > deadline:
            os.killpg(ranks[0], signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)
    return [ended[child] for child in ranks]


if __name__ == "__main__":
    main()
