"""The cells of a study in the order of their numbers; learning rates and lengths follow from the cells before them."""

import math
from dataclasses import dataclass
from statistics import median

from ..errors import ConfigError, DataError
from ..utils.yaml_files import load_yaml
from .plan import TUNING, TUNING_SEED, Cell, Study
from .results import Result, Results

_SAME_LENGTH = 0.02
"""Cells whose number of steps differs by less than this share from that of `samples` are the same cell."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A cell of the grid before its learning rate and length are known."""

    budget: str
    arm: str
    seed: int
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.budget}, arm {self.arm}, " + (
            f"seed {self.seed}" if self.rate is None else f"rate {self.rate:g}"
        )


def places(study: Study) -> list[Place]:
    """Return all cells of a study in their order: trials of learning rates, then each budget, by seed and arm."""
    found = [
        Place(budget=TUNING, arm=arm, seed=TUNING_SEED, rate=rate)
        for arm in study.arms
        for rate in (study.rates.values if study.rates else ())
    ]
    for budget in sorted(study.budgets, key=lambda name: name != "samples"):
        found += [Place(budget=budget, arm=arm, seed=seed) for seed in study.seeds for arm in study.arms]
    return found


def cell_at(study: Study, place: Place, results: Results) -> Cell:
    """Return the cell of a place; raise a ConfigError that names the cells which must be finished before it."""
    rate, steps = place.rate, None
    if place.budget == TUNING:
        assert study.rates is not None
        stages = len(load_yaml(study.recipe_of(place.arm))["stages"])
        steps = (max(1, study.rates.steps // stages),) * stages
    else:
        rate = best_rate(study, place.arm, results)
        steps = None if place.budget == "samples" else _equal_steps(study, place, results)
    return Cell(study=study, arm=place.arm, seed=place.seed, budget=place.budget, rate=rate, steps=steps)


def best_rate(study: Study, arm: str, results: Results) -> float | None:
    """Return the learning rate of an arm whose trial had the least loss; None: the recipe's."""
    if study.rates is None:
        return None
    losses: dict[float, float] = {}
    for rate in study.rates.values:
        place = Place(budget=TUNING, arm=arm, seed=TUNING_SEED, rate=rate)
        losses[rate] = sum(_required(study, place, results)["loss"].values())
    usable = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not usable:
        raise DataError(
            f"study {study.name}: no learning rate of rates.values gives arm {arm} a finite loss; add lower ones"
        )
    return min(usable, key=lambda rate: (usable[rate], rate))


def _equal_steps(study: Study, place: Place, results: Results) -> tuple[int, ...] | None:
    """Return the steps of each stage in which an arm uses as much of a budget as the base does in the recipe's.

    None: as many as the recipe's.
    """

    def used(arm: str) -> float:
        found = (_required(study, Place(budget="samples", arm=arm, seed=seed), results) for seed in study.seeds)
        value = median(one[place.budget] for one in found)
        if not value:
            raise ConfigError(
                f"study {study.name}: the training of arm {arm} was too short to be timed; set "
                "trainer.log_every_n_steps to less than half of its steps"
            )
        return value

    share = used(study.base) / used(place.arm)
    if abs(share - 1) < _SAME_LENGTH:
        return None
    own = _required(study, Place(budget="samples", arm=place.arm, seed=study.seeds[0]), results)
    return tuple(max(1, round(steps * share)) for steps in own["steps"])


def finished(study: Study, budget: str, results: Results) -> dict[str, dict[int, Result]]:
    """Return the results of a budget that are there, by arm and seed."""
    found: dict[str, dict[int, Result]] = {arm: {} for arm in study.arms}
    for arm in study.arms:
        for seed in study.seeds:
            try:
                result = results.read(cell_at(study, Place(budget=budget, arm=arm, seed=seed), results))
            except ConfigError:  # a cell before it is missing
                continue
            if result is not None:
                found[arm][seed] = result
    return found


def _required(study: Study, place: Place, results: Results) -> Result:
    result = results.read(cell_at(study, place, results))
    if result is None:
        number = places(study).index(place)
        raise ConfigError(
            f"study {study.name}: cell {number} ({place}) must be finished first; run it, or run without --cell"
        )
    return result
