"""A recipe with several stages becomes one `fit` for each, every one starting from the folder its parent wrote.

```yaml
stages:                                        # paths are relative to the recipe
  - {stage: ../stage/1.yaml, data: ../data/cc12m.yaml}
  - {stage: ../stage/2.yaml, data: ../data/bigdocs.yaml, override: {stage.global_batch_size: 256}}
```

`override` sets single keys of a stage's run, as options of the command line do. A stage file that is named by a number
gives its name to the folder of the run; others have the stage's place in front (`2-documents`).

A stage that is finished is skipped and an unfinished one resumes, so the same command continues a killed run.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, nearest

RUN_DIR = "--run_dir"
FILES = ("stage", "data", "benchmark", "trainer")
OVERRIDE = "override"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of LightningCLI: its options, and the stage's folder if it is one of several."""

    options: list[str]
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """One stage of a recipe.

    Attributes:
        files: Axis -> absolute path of its file.
        override: Dotted key -> value, over what the files say.
    """

    files: dict[str, Path]
    override: dict[str, Any] = field(default_factory=dict)

    def options(self) -> list[str]:
        """The entry as options of the command line."""
        files = [word for axis, path in self.files.items() for word in (f"--{axis}", str(path))]
        values = {key: v if isinstance(v, str) else json.dumps(v) for key, v in self.override.items()}
        return [*files, *(f"--{key}={value}" for key, value in values.items())]

    def stage_settings(self) -> dict[str, Any]:
        """Content of the stage's file, its overrides applied."""
        own = {key.removeprefix("stage."): v for key, v in self.override.items() if key.startswith("stage.")}
        return {**_load(self.files["stage"]), **own}


def plan_runs(options: list[str]) -> list[Run]:
    """Split the options of `fit` into one run for each stage of the recipe among its `--config` files.

    Raises:
        ConfigError: If a recipe's list of stages has another form.
    """
    found = _find_recipe(options)
    if found is None:
        return [Run(options=options)]
    position, recipe, stages = found
    kept, chosen = _take_run_dir(options)
    # The position counts options in front of it, of which --run_dir may have been one.
    position -= len(options[:position]) - len(_take_run_dir(options[:position])[0])
    root = chosen or Path("runs") / recipe.stem
    runs: list[Run] = []
    for entry, name in zip(stages, _folder_names(stages), strict=True):
        folder = root / name
        parent = runs[-1].folder if runs else None
        # Behind the user's options: a `--stage.init_from` of theirs is where the first stage starts, and only that one.
        start = [] if parent is None else ["--stage.init_from", str(parent / "hf")]
        # Behind the recipe and before the user's later options, which therefore win in every stage.
        own = [*kept[:position], *entry.options(), *kept[position:]]
        runs.append(Run(options=[*own, *start, RUN_DIR, str(folder), "--stages=null"], folder=folder))
    return runs


def read_stages(recipe: Path) -> list[StageEntry]:
    """The stages of a recipe; none if it lists none."""
    return _entries((_load(recipe) or {}).get("stages") or [], recipe)


def _folder_names(stages: list[StageEntry]) -> list[str]:
    stems = [entry.files["stage"].stem for entry in stages]
    numbered = all(stem.isdecimal() for stem in stems) and len({*stems}) == len(stems)
    return stems if numbered else [f"{index}-{stem}" for index, stem in enumerate(stems, start=1)]


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error


def _find_recipe(options: list[str]) -> tuple[int, Path, list[StageEntry]] | None:
    """Position behind the last `--config` whose file lists stages, with that file and the list."""
    found = None
    for index, word in enumerate(options):
        if word in ("-c", "--config") and index + 1 < len(options):
            path, end = Path(options[index + 1]), index + 2
        elif word.startswith("--config="):
            path, end = Path(word.split("=", 1)[1]), index + 1
        else:
            continue
        if not path.is_file():
            raise ConfigError(f"--config {path}: there is no such file")
        content = _load(path)
        if isinstance(content, dict) and content.get("stages"):
            found = end, path, _entries(content["stages"], path)
    return found


def _take_run_dir(options: list[str]) -> tuple[list[str], Path | None]:
    kept: list[str] = []
    root = None
    words = iter(options)
    for word in words:
        if word == RUN_DIR:
            value = next(words, None)
            root = Path(value) if value is not None else root
        elif word.startswith(RUN_DIR + "="):
            root = Path(word.split("=", 1)[1])
        else:
            kept.append(word)
    return kept, root


def _entries(stages: Any, recipe: Path) -> list[StageEntry]:
    if not isinstance(stages, list):
        raise ConfigError(f"{recipe}: `stages` must be a list of stages, found {stages!r}")
    return [_entry(given, recipe) for given in stages]


def _entry(given: Any, recipe: Path) -> StageEntry:
    if not isinstance(given, dict) or "stage" not in given:
        raise ConfigError(f"{recipe}: each entry of `stages` needs a `stage:` file, found {given!r}")
    for key in given:
        if key not in (*FILES, OVERRIDE):
            raise ConfigError(
                f"{recipe}: unknown key {key!r} in `stages`; {nearest(str(key), (*FILES, OVERRIDE))}"
            )
        if key != OVERRIDE and not isinstance(given[key], str):
            raise ConfigError(f"{recipe}: {key} must be the path of a file, found {given[key]!r}")
    override = given.get(OVERRIDE) or {}
    if not isinstance(override, dict) or not all(isinstance(key, str) and "." in key for key in override):
        raise ConfigError(
            f"{recipe}: override must map dotted keys to values, such as {{stage.max_steps: 10}}, found {override!r}"
        )
    files = {key: (recipe.parent / value).resolve() for key, value in given.items() if key != OVERRIDE}
    return StageEntry(files=files, override=override)
