"""A recipe with several stages becomes one `fit` for each, every one starting from the folder its parent wrote.

```yaml
stages:                                        # paths are relative to the recipe
  - {stage: ../stage/1.yaml, data: ../data/cc12m.yaml}
  - {stage: ../stage/2.yaml, data: ../data/bigdocs.yaml}
```

A stage that is finished is skipped and an unfinished one resumes, so the same command continues a killed run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, nearest

RUN_DIR = "--run_dir"
_KEYS = ("stage", "data", "benchmark", "trainer")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of LightningCLI: its options, and the stage's folder if it is one of several."""

    options: list[str]
    folder: Path | None = None


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
    for index, entry in enumerate(stages, start=1):
        paths = {key: (recipe.parent / value).resolve() for key, value in _checked(entry, recipe).items()}
        folder = root / f"{index}-{paths['stage'].stem}"
        own = [word for key, path in paths.items() for word in (f"--{key}", str(path))]
        parent = runs[-1].folder if runs else None
        # Behind the user's options: a `--stage.init_from` of theirs is where the first stage starts, and only that one.
        start = [] if parent is None else ["--stage.init_from", str(parent / "hf")]
        # Behind the recipe and before the user's later options, which therefore win in every stage.
        merged = [*kept[:position], *own, *kept[position:], *start, RUN_DIR, str(folder), "--stages=null"]
        runs.append(Run(options=merged, folder=folder))
    return runs


def read_stages(recipe: Path) -> list[dict[str, Path]]:
    """The stages of a recipe, each with the absolute paths of its files; empty if it has none."""
    content = _load(recipe) or {}
    entries = _as_list(content.get("stages") or [], recipe)
    return [{k: (recipe.parent / v).resolve() for k, v in _checked(e, recipe).items()} for e in entries]


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error


def _find_recipe(options: list[str]) -> tuple[int, Path, list[Any]] | None:
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
            found = end, path, _as_list(content["stages"], path)
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


def _as_list(stages: Any, recipe: Path) -> list[Any]:
    if not isinstance(stages, list):
        raise ConfigError(f"{recipe}: `stages` must be a list of stages, found {stages!r}")
    return stages


def _checked(entry: Any, recipe: Path) -> dict[str, str]:
    if not isinstance(entry, dict) or "stage" not in entry:
        raise ConfigError(f"{recipe}: each entry of `stages` needs a `stage:` file, found {entry!r}")
    for key in entry:
        if key not in _KEYS:
            raise ConfigError(f"{recipe}: unknown key {key!r} in `stages`; {nearest(str(key), _KEYS)}")
        if not isinstance(entry[key], str):
            raise ConfigError(f"{recipe}: {key} must be the path of a file, found {entry[key]!r}")
    return entry
