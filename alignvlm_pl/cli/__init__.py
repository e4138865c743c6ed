"""The command line: `fit`, `validate`, `test`, `predict`, and helpers that work without torch.

This module only finds the command; each command imports what it needs when it runs, so that `--help` and `prepare`
start at once.
"""

import errno
import io
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

from ..errors import AlignVLMError, nearest
from ..utils.cpu import allocator_variables, thread_variables
from ..utils.installation import check_top_level_packages
from ..utils.stop_signals import INTERRUPTED, listen_until_exit
from .slurm import exit_status_for_srun

COMMANDS = {
    "fit": ("alignvlm_pl.cli.training", "train one stage, or the stages of a recipe one after the other"),
    "validate": ("alignvlm_pl.cli.training", "generate and score the predictions of a config's benchmarks"),
    "test": ("alignvlm_pl.cli.training", "as validate, for the final scores"),
    "predict": ("alignvlm_pl.cli.training", "generate the predictions without scoring them"),
    "export": ("alignvlm_pl.cli.export", "write a checkpoint as a Hugging Face folder"),
    "read": ("alignvlm_pl.cli.read", "answer questions about the pages of files with a trained model"),
    "score": ("alignvlm_pl.cli.score", "score a file of predictions, without a model"),
    "prepare": ("alignvlm_pl.cli.prepare", "write shards, or install the embedded weights"),
    "shards": ("alignvlm_pl.cli.shards", "verify datasets, count and show what they hold"),
    "replay": ("alignvlm_pl.cli.replay", "rebuild the batch of a training step, with its losses"),
    "params": ("alignvlm_pl.cli.params", "print what each stage of a recipe trains, without loading weights"),
    "describe": ("alignvlm_pl.cli.describe", "print what a checkpoint or an export is"),
    "prune": ("alignvlm_pl.cli.prune", "find the rows of the vocabulary that ALIGN's weights fall on, over a dataset"),
    "study": ("alignvlm_pl.cli.study", "run a study of the paper's claims and write its report"),
    "demo": ("alignvlm_pl.cli.demo", "train and score the embedded default from nothing"),
    "box": ("alignvlm_pl.cli.box", "train and score the model box:receipts again, from nothing"),
}

_RESUMED = {
    **dict.fromkeys(("validate", "test", "prepare", "study"), "the same command resumes from what is on the disk"),
    "read": "with --out the same command resumes from what is on the disk",
}
"""Commands that do not start again from nothing after Ctrl-C -> what they do."""

_ALONE = ("demo", "box", "study")
"""Commands that take all cores of the machine."""

_FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, of the process's arguments where `argv`, those after the program's name, is None.

    Returns:
        Exit status: 0, or 1 after an error about the user's input, or 2 after a wrong command line; 130 after Ctrl-C;
        of `fit` also 85 where it was asked to stop and has saved, and inside a SLURM job those of
        `slurm.exit_status_for_srun`.
    """
    if argv is None:  # this process is the command
        _restart_with_variables()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            if arguments[:1] == ["fit"]:
                if argv is None:
                    listen_until_exit()
                return exit_status_for_srun(lambda: _dispatch(arguments))
            return _dispatch(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"interrupted: {_RESUMED.get(arguments[0], 'nothing of it is kept')}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _output_closed():
            raise
        # The interpreter flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _restart_with_variables() -> None:
    """Start this process again, where it needs variables that count when a program starts."""
    wanted = allocator_variables() if sys.argv[1:2] in ([name] for name in _ALONE) else {}
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        wanted["PYTHONUTF8"] = "1"  # libraries read files in the locale's encoding
    if wanted:
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are no UTF-8, as on stderr


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(f"error: a command is missing; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = arguments[0]
    if command in ("-h", "--help", "--version"):
        print(import_module("alignvlm_pl").__version__ if command == "--version" else _help())
        return 0
    if command not in COMMANDS:
        print(f"error: there is no command {command!r}; {nearest(command, COMMANDS)}", file=sys.stderr)
        return 2
    check_top_level_packages()
    if os.getcwd() not in sys.path:  # classes of the user, by class_path; last, so that none hides a package
        sys.path.append(os.getcwd())
    _configure_output()
    os.environ.update(thread_variables(alone=command in _ALONE))
    run: Callable[[list[str]], int | None] = import_module(COMMANDS[command][0]).run
    try:
        return run(arguments) or 0
    except AlignVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _FULL_OR_FORBIDDEN:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}; free some space or set another run_dir", file=sys.stderr)
        return 1


def _output_closed() -> bool:
    """Whether the reader of our output has gone (`alignvlm --help | head`); other broken pipes are errors."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _help() -> str:
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    usage = "usage: alignvlm COMMAND [options]      (from a checkout: python cli.py COMMAND [options])"
    return "\n".join([usage, "", "commands:", *lines, "", "`alignvlm COMMAND --help` lists a command's options."])


# Lines of Lightning that this project's own lines say better, or that its loaders answer by design; others are shown.
_LINES = (
    "Seed set to",
    "GPU available",
    "TPU available",
    "💡 Tip:",
    "`weights_only` was not set",
)
_WARNINGS = (
    "LightningCLI's args parameter is intended",
    "The `srun` command is available on your system but is not used",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ".* does not have many workers",  # the bar and data/* show what the run waits for
    "Total length of .* is zero",
    "You defined a `validation_step` but have no `val_dataloader`",  # data without `val` is ordinary
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",  # those of `fit`
    "You're resuming from a checkpoint that ended before the epoch ended",  # the DataModule keeps the position
)


def _configure_output() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_shown)
    for name in ("alignvlm_pl", "callbacks", "datamodules"):
        logging.getLogger(name).setLevel(logging.INFO)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # Lightning calls methods of jsonargparse by their earlier names.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")


def _is_shown(record: logging.LogRecord) -> bool:
    return not (record.name.startswith("lightning.") and record.getMessage().startswith(_LINES))
