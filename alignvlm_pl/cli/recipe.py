"""A recipe with several stages becomes one `fit` for each, every one starting from the folder its parent wrote.

```yaml
stages:                                        # paths are relative to the recipe
  - {stage: ../stage/1.yaml, data: ../data/cc12m.yaml}
  - {stage: ../stage/2.yaml, data: ../data/bigdocs.yaml, override: {stage.global_batch_size: 256}}
```

`override` sets single keys of a stage's run, as options of the command line do. A stage file that is named by a number
gives its name to the folder of the run; others have the stage's place in front (`2-documents`).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, require_known
from ..utils.yaml_files import load_yaml

RUN_DIR = "--run_dir"
FILES = ("stage", "data", "benchmark", "trainer")
OVERRIDE = "override"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of LightningCLI: its options, and the stage's folder if it is one of several."""

    options: list[str]
    folder: Path | None = None


class _Argument(NamedTuple):
    """An option of the command line: its name, its value if it has one, and the words of both."""

    name: str
    value: str | None
    words: list[str]


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """One stage of a recipe: axis -> absolute path of its file; dotted key -> value, over what the files say."""

    files: dict[str, Path]
    override: dict[str, Any] = field(default_factory=dict)

    def options(self) -> list[str]:
        """The entry as options of the command line."""
        files = [word for axis, path in self.files.items() for word in (f"--{axis}", str(path))]
        values = {key: v if isinstance(v, str) else json.dumps(v) for key, v in self.override.items()}
        return [*files, *(f"--{key}={value}" for key, value in values.items())]

    def settings(self, axis: str, default: Path | None = None) -> dict[str, Any]:
        """Content of the file of an axis, or else of another one, the overrides applied."""
        path = self.files.get(axis, default)
        settings = {} if path is None else load_yaml(path)
        for key, value in self.override.items():
            head, *names, last = key.split(".")
            inner = settings
            for name in names if head == axis else ():
                inner = inner.setdefault(name, {})
            if head == axis:
                inner[last] = value
        return settings


def plan_runs(options: list[str]) -> list[Run]:
    """Split the options of `fit` into one run for each stage of the recipe among its `--config` files.

    A stage is configured by the options before the recipe, the recipe, its entry there, and the options behind the
    recipe; later ones win.
    """
    arguments = _arguments(options)
    recipes = [
        (end, Path(one.value), stages)
        for end, one in enumerate(arguments, start=1)
        if one.name in ("-c", "--config") and one.value and (stages := read_stages(Path(one.value), option="--config "))
    ]
    if not recipes:
        return [Run(options=options)]
    end, path, stages = recipes[-1]
    before, behind = (
        [word for one in part if one.name != RUN_DIR for word in one.words]
        for part in (arguments[:end], arguments[end:])
    )
    roots = [Path(one.value) for one in arguments if one.name == RUN_DIR and one.value is not None]
    root = roots[-1] if roots else Path("runs") / path.stem
    runs: list[Run] = []
    stems = [entry.files["stage"].stem for entry in stages]
    numbered = all(stem.isdecimal() for stem in stems) and len({*stems}) == len(stems)
    for index, (entry, stem) in enumerate(zip(stages, stems, strict=True), start=1):
        folder = root / (stem if numbered else f"{index}-{stem}")
        parent = runs[-1].folder if runs else None
        # Behind the user's options: a `--stage.init_from` of theirs is where the first stage starts, and only that one.
        start = [] if parent is None else ["--stage.init_from", str(parent / "hf")]
        own = [*before, *entry.options(), *behind, *start]
        runs.append(Run(options=[*own, RUN_DIR, str(folder), "--stages=null"], folder=folder))
    return runs


def read_stages(recipe: Path, *, option: str = "") -> list[StageEntry]:
    """Return the stages of a recipe, none if it lists none; a list of another form is a ConfigError."""
    stages = load_yaml(recipe, option=option).get("stages")
    if stages is None:  # as a saved configuration has it
        return []
    if stages == []:
        raise ConfigError(f"{recipe}: `stages` is empty; list one, such as {{stage: ../stage/1.yaml}}, or remove it")
    if not isinstance(stages, list):
        raise ConfigError(f"{recipe}: `stages` must be a list of stages, found {stages!r}")
    return [_entry(given, recipe) for given in stages]


def _arguments(options: list[str]) -> list[_Argument]:
    found: list[_Argument] = []
    for word in options:
        if word.startswith("--") or word == "-c":
            name, separator, value = word.partition("=")
            found.append(_Argument(name, value if separator else None, [word]))
        elif found and found[-1].value is None:
            last = found.pop()
            found.append(_Argument(last.name, word, [*last.words, word]))
        else:
            found.append(_Argument("", None, [word]))
    return found


def _entry(given: Any, recipe: Path) -> StageEntry:
    if not isinstance(given, dict) or "stage" not in given:
        raise ConfigError(f"{recipe}: each entry of `stages` needs a `stage:` file, found {given!r}")
    for key in given:
        require_known(key, (*FILES, OVERRIDE), f"{recipe}: unknown key {key!r} in `stages`")
        if key != OVERRIDE and not isinstance(given[key], str):
            raise ConfigError(f"{recipe}: {key} must be the path of a file, found {given[key]!r}")
    override = given.get(OVERRIDE) or {}
    if not isinstance(override, dict) or not all(isinstance(key, str) and "." in key for key in override):
        raise ConfigError(
            f"{recipe}: override must map dotted keys to values, such as {{stage.max_steps: 10}}, found {override!r}"
        )
    files = {key: (recipe.parent / value).resolve() for key, value in given.items() if key != OVERRIDE}
    return StageEntry(files=files, override=override)
