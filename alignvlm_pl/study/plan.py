"""A study: a grid of arms and seeds over one recipe, declared in a YAML file.

```yaml
recipe: ../recipe/study-strings.yaml          # paths are relative to the file
arms:                                         # name -> options of `fit` over the recipe
  align: {connector: ../model/connector/align.yaml, connector.vocab_rows: 4096}
  mlp: {connector: ../model/connector/mlp.yaml}
base: align                                   # the others are compared with it
seeds: [0, 1, 2]
budgets: [samples, flops, seconds]            # equal in all arms; `samples` is what the recipe says
rates: {option: stage.lr_connector, values: [3.0e-4, 1.0e-3, 3.0e-3], steps: 200}   # one grid for all arms
```
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError, require_known
from ..utils.yaml_files import load_yaml

BUDGETS = ("samples", "flops", "seconds")
"""What is equal in all arms."""
TUNING = "tuning"
"""Budget of the cells that choose a learning rate."""
TUNING_SEED = 1000
_FILES = (".yaml", ".json")
"""Endings of values that name a file."""
MEASURES = ("noise", "tokens", "prune", "collapse", "forgetting", "examples")
"""Taken of trained cells, beside their scores."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The learning rates that every arm tries.

    Attributes:
        option: Option of `fit` that is tuned, such as `stage.lr_connector`.
        values: Its values.
        steps: Steps of a trial, divided evenly among the stages; the value with the least loss on the `val` datasets is
            used.
    """

    option: str
    values: list[float]
    steps: int


@dataclass(frozen=True, kw_only=True)
class Study:
    """See the module; `options` are those of all arms, `measures` the settings of each of `MEASURES` that is taken of
    trained cells, `cost` those of `study cost`.
    """

    path: Path
    recipe: Path
    arms: dict[str, dict[str, Any]]
    base: str
    seeds: list[int]
    budgets: list[str]
    rates: Rates | None = None
    options: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, dict[str, Any]] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.stem

    def recipe_of(self, arm: str) -> Path:
        """Return the recipe of an arm: its own option `recipe`, or the study's."""
        return Path(self.arms[arm].get("recipe", self.recipe))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study: an arm with a seed.

    Attributes:
        budget: One of `BUDGETS`, or `TUNING`.
        rate: Learning rate of the tuned option; None: as the recipe says.
        steps: Optimizer steps of each stage; None: as the recipe says.
    """

    study: Study
    arm: str
    seed: int
    budget: str
    rate: float | None = None
    steps: tuple[int, ...] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Options of `fit` over the recipe."""
        found = {**self.study.options, **self.study.arms[self.arm], "seed_everything": self.seed}
        if self.rate is not None and self.study.rates is not None:
            found[self.study.rates.option] = self.rate
        return found

    @property
    def recipe(self) -> Path:
        return self.study.recipe_of(self.arm)

    def words(self, recipe: Path) -> list[str]:
        """Return words of the command line that run a recipe, this cell's or one made of it, with the options."""
        found = ["--config", str(recipe)]
        for key, value in self.options.items():
            if key != "recipe" and (self.steps is None or key != "stage.max_steps"):
                found.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
        return found

    @property
    def id(self) -> str:
        """Hash of everything that determines the run: options, and the content of all files that they name."""
        content = [resolve(str(self.recipe)), resolve(self.options), self.steps]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def recipe_of_lengths(recipe: Path, steps: Sequence[int]) -> dict[str, Any]:
    """Return a recipe whose stages train so many steps, with absolute paths, so that it can be written anywhere."""
    content = load_yaml(recipe)

    def absolute(value: Any) -> Any:
        return str((recipe.parent / value).resolve()) if isinstance(value, str) and value.endswith(".yaml") else value

    stages = [
        {**{key: absolute(value) for key, value in entry.items()}, "override": {**entry.get("override", {}), **length}}
        for entry, length in zip(content["stages"], [{"stage.max_steps": count} for count in steps], strict=True)
    ]
    return {**{key: absolute(value) for key, value in content.items()}, "stages": stages}


def read_study(path: Path) -> Study:
    """Read a study's file; raise a ConfigError for what is no study, with the key and what was expected."""
    content = load_yaml(path)
    require_keys(content, {"recipe", "arms", "base", "seeds"}, {*Study.__dataclass_fields__} - {"path"}, str(path))
    arms = content["arms"]
    if not (isinstance(arms, dict) and arms and all(isinstance(one, dict) for one in arms.values())):
        raise ConfigError(f"{path}: `arms` must map names to options of `fit`, found {arms!r:.60}")
    require_known(content["base"], arms, f"{path}: base={content['base']!r} is no arm")
    seeds = content["seeds"]
    numbers = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
    if not numbers or not 0 < len(seeds) == len({*seeds}):
        raise ConfigError(f"{path}: `seeds` must be a list of different whole numbers, found {seeds!r}")
    budgets = content.get("budgets", ["samples"])
    for budget in budgets:
        require_known(budget, BUDGETS, f"{path}: budget {budget!r} is unknown")
    if "samples" not in budgets:
        raise ConfigError(f"{path}: budgets={budgets}: add `samples`, from whose cells the other budgets are computed")
    measures, options, cost = (content.get(key) or {} for key in ("measures", "options", "cost"))
    for key, value in (("measures", measures), ("options", options), ("cost", cost)):
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: `{key}` must be a mapping, found {value!r:.60}")
    for name in measures:
        require_known(name, MEASURES, f"{path}: measure {name!r} is unknown")
    rates = content.get("rates")
    study = Study(
        path=path,
        recipe=_found(path, content["recipe"]),
        arms={name: _with_paths(path, options) for name, options in arms.items()},
        base=content["base"],
        seeds=seeds,
        budgets=list(budgets),
        rates=None if rates is None else _rates(path, rates),
        options=_with_paths(path, options),
        measures={name: settings or {} for name, settings in measures.items()},
        cost=cost,
    )
    ids: dict[str, str] = {}
    for arm in study.arms:
        same = ids.setdefault(Cell(study=study, arm=arm, seed=0, budget="samples").id, arm)
        if same != arm:
            raise ConfigError(f"{path}: arms {same} and {arm} are the same run; leave one of them out")
    return study


def model_file(study: Study, arm: str) -> Path:
    """Return the file of an arm's model: its option `model`, or the recipe's."""
    recipe = study.recipe_of(arm)
    given = {**study.options, **study.arms[arm]}.get("model")
    return _found(recipe, load_yaml(recipe)["model"]) if given is None else Path(given)


def connector_of(study: Study, arm: str) -> dict[str, Any]:
    """Return the options of an arm's connector: those of its file, or of its model, with the single options over it."""
    options = {**study.options, **study.arms[arm]}
    recipe = study.recipe_of(arm)
    named = load_yaml(recipe).get("connector")
    file = Path(options["connector"]) if "connector" in options else _found(recipe, named) if named else None
    found = load_yaml(model_file(study, arm))["spec"].get("connector", {}) if file is None else load_yaml(file)
    single = {key.partition(".")[2]: value for key, value in options.items() if key.startswith("connector.")}
    return {**found, **single}


def require_keys(content: Mapping[str, Any], needed: set[str], known: set[str], where: str) -> None:
    """Raise a ConfigError for keys that are missing or unknown."""
    for key in content:
        require_known(key, known, f"{where}: key {key!r} is unknown")
    if missing := sorted(needed - content.keys()):
        raise ConfigError(f"{where}: `{missing[0]}` is missing; a study needs {', '.join(sorted(needed))}")


def resolve(value: Any, *, folder: Path = Path()) -> Any:
    """Return a value with the content of each file that it names, so that it does not depend on where they lie."""
    if isinstance(value, dict):
        return {key: resolve(inner, folder=folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [resolve(inner, folder=folder) for inner in value]
    if isinstance(value, str) and value.endswith(_FILES):
        return _content(folder / value)
    return value


@cache  # one study asks for the ids of its cells again and again
def _content(path: Path) -> Any:
    if path.suffix == ".json":  # rows of the vocabulary, by `prune`
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return resolve(load_yaml(path), folder=path.parent)


def _rates(path: Path, rates: Any) -> Rates:
    if not isinstance(rates, dict):
        raise ConfigError(f"{path}: `rates` must have option, values and steps, found {rates!r}")
    names = {*Rates.__dataclass_fields__}
    require_keys(rates, names, names, f"{path}: rates")
    values = rates["values"]
    if not (isinstance(values, list) and values and all(isinstance(v, float) and v > 0 for v in values)):
        raise ConfigError(f"{path}: rates.values must be learning rates such as [1.0e-3], found {values!r}")
    if type(rates["steps"]) is not int or rates["steps"] < 1:
        raise ConfigError(f"{path}: rates.steps={rates['steps']!r}: expected at least 1")
    return Rates(**rates)


def _with_paths(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return options whose files are those beside the study's."""
    return {
        key: str(_found(path, value)) if isinstance(value, str) and value.endswith(_FILES) else value
        for key, value in options.items()
    }


def _found(path: Path, name: str) -> Path:
    found = Path(os.path.normpath(path.parent / name))
    if not found.is_file():
        raise ConfigError(f"{path}: there is no file {found}")
    return found
