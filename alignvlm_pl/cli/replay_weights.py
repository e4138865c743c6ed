"""Which weights a step began with, and which of them are still there."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..strategies.sharded_checkpoint import is_folder, read_rest, read_whole
from ..training.export import RECORD, compare_states

if TYPE_CHECKING:
    from ..training.module import AlignVLMModule
    from ..training.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights that losses can be computed with.

    Attributes:
        path: Checkpoint or folder; None: the stage's initial ones.
        after: Optimizer steps of the stage that they have had; None: unknown.
        doubt: Why they may be others than those the step began with; empty: they are the same.
    """

    path: Path | None
    after: int | None
    doubt: str = ""

    def began(self, step: int) -> bool:
        """Whether the step began with them."""
        return self.after == step - 1 and not self.doubt

    def told(self, step: int) -> str:
        """What they are, and what follows for the losses."""
        name = "the stage's initial weights" if self.path is None else str(self.path)
        if self.began(step):
            return f"{name} (after step {self.after}): the weights that step {step} began with"
        known = "of no known step" if self.after is None else f"after step {self.after}"
        why = self.doubt or f"step {step} began with those after step {step - 1}, which are not there"
        return f"{name} ({known}), NOT those the step began with: {why}. The losses differ from the recorded ones"


def choose(run: Path, step: int, *, given: Path | None, initial_doubt: str, stage: "Stage") -> Weights:
    """The weights that a step began with, or the nearest of those that the run has left.

    Args:
        run: Its folder.
        step: Counted from 1.
        given: What the user chose instead.
        initial_doubt: See `Weights.doubt`.
        stage: The stage of the run.

    Raises:
        CheckpointError: What the user chose is not there.
    """
    if given is not None:
        if not given.exists():
            raise CheckpointError(f"--weights {given}: there is no such file or folder")
        return Weights(path=given, after=_steps(given), doubt=_doubt(given, stage))
    found = [Weights(path=None, after=0, doubt=initial_doubt)]
    end = [] if stage.adapters else [run / "hf"]  # adapters are merged there, and cannot be told apart
    for path in [*sorted((run / "checkpoints").glob("*.ckpt")), *end]:
        after = _steps(path) if path.exists() else None
        if after is not None:
            found.append(Weights(path=path, after=after, doubt=_doubt(path, stage)))
    return min(found, key=lambda weights: (abs((weights.after or 0) - (step - 1)), bool(weights.doubt)))


def load(module: "AlignVLMModule", weights: Weights) -> None:
    """Copy weights into a built model, whose own are the stage's initial ones.

    Raises:
        CheckpointError: They are of another model, or damaged.
    """
    from ..models.build import load_weights

    if weights.path is None:
        return
    if weights.path.is_dir() and not is_folder(weights.path):
        load_weights(module.net, weights.path)
        return
    checkpoint = read_whole(weights.path)
    # With stage.ema_decay a checkpoint has two states (CONTRACT: callbacks/averaged_weights.py); this one trains.
    state = checkpoint.get("current_model_state", checkpoint["state_dict"])
    compare_states(state, module.state_dict(), source=str(weights.path))
    module.load_state_dict(state)


def calibration(run: Path) -> dict[str, float] | None:
    """What `stage.calibrate` did to the initial weights, as far as the run has written it down."""
    record = run / "hf" / RECORD
    if record.is_file():
        found: dict[str, float] | None = json.loads(record.read_text()).get("calibration")
        return found
    for path in sorted((run / "checkpoints").glob("*.ckpt")):
        if path.exists():
            kept: dict[str, float] | None = read_rest(path).get("stage", {}).get("calibration")
            return kept
    return None


def _doubt(path: Path, stage: "Stage") -> str:
    averaged = stage.ema_decay and path.is_dir() and not is_folder(path)
    return "the folder holds the average of stage.ema_decay" if averaged else ""


def _steps(path: Path) -> int | None:
    """Optimizer steps that weights have had in their stage; None where nothing says so."""
    if path.is_dir() and not is_folder(path):
        record = path / RECORD
        return int(json.loads(record.read_text())["steps"]) if record.is_file() else None
    return int(read_rest(path)["global_step"])
