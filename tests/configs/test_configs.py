"""Every shipped configuration is true: it parses, its axes do not overlap, it says what the paper's table 6 says."""

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import datamodules
from alignvlm_pl.cli import box, demo
from alignvlm_pl.cli.recipe import plan_runs, read_stages
from alignvlm_pl.metrics import METRICS
from alignvlm_pl.preprocessing.tiling import RULES, Tiling
from alignvlm_pl.training.module import AlignVLMModule
from alignvlm_pl.training.stage import Stage, accumulation
from datamodules.prepare import sroie
from datamodules.prepare.synthetic.command import _datasets, _parser

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Axis -> the key of the command line that takes its files.
AXES = {"model": "model", "data": "data", "stage": "stage", "benchmark": "benchmark", "cluster": "trainer"}
AXES["model/connector"] = "connector"
PAPER_RECIPES = {"llama3.2-1b": "1b", "llama3.2-3b": "3b", "llama3.1-8b": "8b"}
DERIVED = {"max_steps", "max_epochs", "gradient_clip_val", "accumulate_grad_batches", "default_root_dir"}
"""Trainer keys that follow from the stage and the run folder (alignvlm_pl/cli/lightning_cli.py refuses them)."""

# jsonargparse 4.49 renamed what Lightning's CLI calls; the first such warning comes with a note about itself.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:\s*``instantiate_classes``", r"ignore:\s*By default only one JsonargparseDeprecationWarning"
)

# Paper, table 6: global batch, text length, epochs, learning rate, parts trained.
TABLE_6 = {
    "1-1b": (512, 1024, 1, 1e-5, "all"),
    "2-1b": (512, 2048, 1, 5e-5, "all"),
    "3-1b": (512, 2048, 5, 5e-5, "no vision"),
    "1-3b": (512, 1024, 1, 1e-5, "all"),
    "2-3b": (256, 2048, 1, 5e-5, "all"),
    "3-3b": (256, 2048, 5, 5e-5, "no vision"),
    "1-8b": (512, 1024, 1, 1e-5, "all"),
    "2-8b": (256, 2048, 1, 1e-5, "all"),
    "3-8b": (256, 2048, 5, 1e-5, "no vision"),
}


def _load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text("utf-8"))
    assert isinstance(content, dict), f"{path} is no mapping"
    return content


def _files(axis: str) -> list[Path]:
    return sorted((CONFIGS / axis).glob("*.yaml"))


def _flat(content: dict[str, Any], prefix: str) -> set[str]:
    keys: set[str] = set()
    for key, value in content.items():
        name = f"{prefix}.{key}" if prefix else key
        keys |= _flat(value, name) if isinstance(value, dict) and value else {name}
    return keys


def _ids(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def _settings(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of a file's settings, and of the overrides in a recipe, with their values."""
    for key, value in content.items() if isinstance(content, dict) else ():
        yield f"{prefix}{key}", value
        yield from _settings(value, "" if key == "override" else f"{prefix}{key}.")
    for entry in content if isinstance(content, list) else ():
        yield from _settings(entry)


def test_every_setting_of_model_and_stage_is_in_a_shipped_file() -> None:
    """What no file sets is tried by nobody; a file's settings are built on the tiny model with all others."""
    shipped = [dict(_settings(_load(path))) for path in CONFIGS.rglob("*.yaml")]
    keys = {key.rpartition(".")[2] for settings in shipped for key in settings}
    by_recipe_runner, by_user = {"init_from"}, {"weights", "loss_backend", "optimizer"}
    assert {field.name for field in dataclasses.fields(Stage)} - keys <= by_recipe_runner | by_user
    assert set(inspect.signature(AlignVLMModule).parameters) - keys <= by_user
    assert {settings.get("spec.tiling.rule") for settings in shipped} - {None} == set(RULES)


# --- every file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=_ids)
def test_is_a_mapping_in_a_known_folder(path: Path) -> None:
    assert _load(path)
    assert path == CONFIGS / "base.yaml" or path.parent.relative_to(CONFIGS).as_posix() in {*AXES, "recipe", "study"}


@pytest.mark.parametrize("path", _files("stage"), ids=_ids)
def test_stage_file_is_a_stage(path: Path) -> None:
    stage = Stage(**_load(path))
    # PyYAML reads 1e-5 (without a dot) as text.
    assert all(rate is None or isinstance(rate, float) for rate in stage.learning_rates.values())
    assert stage.name == path.stem


@pytest.mark.parametrize("name", TABLE_6)
def test_paper_stage_is_table_6(name: str) -> None:
    number, size = name.split("-")
    (recipe,) = (recipe for recipe, its_size in PAPER_RECIPES.items() if its_size == size)
    stage = Stage(**read_stages(CONFIGS / "recipe" / f"{recipe}.yaml")[int(number) - 1].settings("stage"))
    batch, length, epochs, rate, parts = TABLE_6[name]
    assert (stage.global_batch_size, stage.max_text_length, stage.epochs) == (batch, length, epochs)
    assert stage.max_steps is None
    assert stage.max_minutes is None
    vision = rate if parts == "all" else None
    assert stage.learning_rates == {"vision": vision, "connector": rate, "llm": rate}
    assert (stage.objective, stage.readout_weight) == ("answer", 0.0), "the paper has no read warm start"
    assert (stage.name, stage.parent) == (number, None if number == "1" else str(int(number) - 1))


@pytest.mark.parametrize("path", _files("data"), ids=_ids)
def test_data_file_names_a_datamodule_and_its_options(path: Path) -> None:
    content = _load(path)
    assert "." not in content["class_path"], "class names are bare, so that packages may move"
    # Options that a DataModule hands on with ** are those of its base.
    kinds = inspect.getmro(getattr(datamodules, content["class_path"]))
    known = {name for kind in kinds if "datamodules" in kind.__module__ for name in inspect.signature(kind).parameters}
    assert set(content["init_args"]) <= known - {"options"}
    assert "max_text_length" not in content["init_args"], "the stage owns it"
    folders = [*content["init_args"].get("train", []), *content["init_args"].get("benchmarks", {}).values()]
    assert all(not Path(folder).is_absolute() and ".." not in Path(folder).parts for folder in folders)


@pytest.mark.parametrize("path", _files("benchmark"), ids=_ids)
def test_benchmark_file_names_options_and_metrics(path: Path) -> None:
    from callbacks.benchmark_evaluation import BenchmarkEvaluation

    content = _load(path)
    assert set(content) <= set(inspect.signature(BenchmarkEvaluation.__init__).parameters)
    assert set(content.get("metrics") or []) <= set(METRICS)


@pytest.mark.parametrize("path", _files("model"), ids=_ids)
def test_model_file_describes_parts_that_fit(path: Path) -> None:
    from alignvlm_pl.models.build import Backbone, ModelSpec
    from alignvlm_pl.models.connectors import build_connector

    spec = _load(path)["spec"]
    parts = {key: Backbone(**spec[key]) for key in ("vision", "llm")}
    built = ModelSpec(**{**spec, **parts})
    connector = dict(built.connector)
    if connector.get("collapse"):  # a name of blanks is replaced by ids of the tokenizer, which is not at hand
        connector["collapse"] = {**connector["collapse"], "tokens": [1]}
    build_connector(connector, vision_dim=3, text_dim=2, vocab_size=5000)
    assert Tiling.from_dict(built.tiling).max_tiles == (1 if path.stem.startswith("study") else 9)
    if (llm := parts["llm"].config) is not None:
        assert llm["hidden_size"] == llm["num_attention_heads"] * llm["head_dim"]


def test_what_the_demo_renders_and_crops_is_as_high_as_its_models_tile() -> None:
    tiling = yaml.safe_load((CONFIGS / "model/embedded.yaml").read_text())["spec"]["tiling"]
    assert (tiling["tile_height"], tiling["tile_width"]) == (sroie.TILE_HEIGHT_PX, sroie.TILE_WIDTH_PX)
    assert tiling["tile_height"] == demo.PAGE_HEIGHT_PX


def test_the_box_prepares_what_its_recipe_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(box, "run_command", lambda *words: commands.append(words))
    box.prepare(["a", "b"])
    assert ("prepare", "sroie", "a", "b", "data/receipts/sroie") in commands
    written = {f"data/receipts/sroie/{name}" for name in ("train", "heldout", "lines", "sheets")}
    for _, kind, *words in commands:
        if kind == "synthetic":
            args = _parser().parse_args(words)
            written |= {f"{args.out}/{name}" for name in _datasets(args)}
    read: set[str] = set()
    for path in sorted((CONFIGS / "data").glob("receipts*.yaml")):
        options = _load(path)["init_args"]
        read |= {folder for source in options.get("mixture", {}).values() for folder in source["sets"]}
        read |= {*options.get("train", []), *options["benchmarks"].values()}
    assert len(read) == 6 and read <= written
    tiling = _load(CONFIGS / "model/receipts.yaml")["spec"]["tiling"]
    assert tiling["tile_width"] == box.PAGE_WIDTH_PX == sroie.PAGE_WIDTH_PX


def test_embedded_mlp_differs_in_the_connector_only() -> None:
    align, mlp = (_load(CONFIGS / "model" / f"{name}.yaml")["spec"] for name in ("embedded", "embedded-mlp"))
    assert align.pop("connector")["type"] == "align"
    assert mlp.pop("connector")["type"] == "mlp"
    assert align == mlp


# --- the axes -------------------------------------------------------------------------------------


def test_one_key_has_one_owner() -> None:
    owned = {axis: set().union(*(_flat(_load(p), AXES[axis]) for p in _files(axis))) for axis in AXES}
    owned["base"] = _flat(_load(CONFIGS / "base.yaml"), "")
    names = list(owned)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            assert owned[one] & owned[other] == set(), f"{one} and {other} set the same key"


def test_nobody_sets_what_follows_from_other_values() -> None:
    for path in [CONFIGS / "base.yaml", *_files("cluster")]:
        content = _load(path)
        trainer = content.get("trainer", {}) if path.name == "base.yaml" else content
        assert DERIVED & set(trainer) == set(), path


def test_gpu_clusters_set_the_same_keys() -> None:
    # `--trainer` after a recipe puts one cluster over another; a key that only the first sets would survive.
    keys = {path.stem: set(_load(path)) for path in _files("cluster") if _load(path)["accelerator"] == "gpu"}
    assert len(keys) == 5
    assert len(set(map(frozenset, keys.values()))) == 1, keys


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", _files("recipe"), ids=_ids)
def test_recipe_names_files_that_exist_and_stages_that_follow(path: Path) -> None:
    content = _load(path)
    assert set(content) <= {"stages", *AXES.values()}, "a recipe names files; values belong to the axes"
    for axis, key in AXES.items():
        if key in content:
            file = (path.parent / content[key]).resolve()
            assert file.is_file()
            assert file.parent == CONFIGS / axis
    before = None
    for entry in read_stages(path):
        assert all(file.is_file() for file in entry.files.values())
        stage = Stage(**entry.settings("stage"))
        # A recipe may begin with a stage that needs a parent; whoever runs it says where that one's folder is.
        assert stage.parent == before or before is None
        before = stage.name


@pytest.mark.parametrize("cluster", ["gpu1", "node8", "fsdp", "slurm8x8", "slurm8x8-fsdp"])
@pytest.mark.parametrize("recipe", PAPER_RECIPES)
def test_global_batch_divides_on_every_cluster(recipe: str, cluster: str) -> None:
    machine = _load(CONFIGS / "cluster" / f"{cluster}.yaml")
    for entry in read_stages(CONFIGS / "recipe" / f"{recipe}.yaml"):
        batch_size = _load(entry.files["data"])["init_args"]["batch_size"]
        wanted = Stage(**entry.settings("stage")).global_batch_size
        num_devices = machine["devices"] * machine["num_nodes"]
        assert accumulation(wanted, batch_size, num_devices) * batch_size * num_devices == wanted


@pytest.mark.parametrize("recipe", ["llama3.2-3b", "llama3.1-8b", "vcr-3b", "low-data-3b"])
def test_models_that_do_not_fit_a_gpu_are_shared_out(recipe: str) -> None:
    """20 bytes a trained parameter under ddp (docs/cluster.md): 80 GB for the 3B model."""
    path = CONFIGS / "recipe" / f"{recipe}.yaml"
    strategy = _load((path.parent / _load(path)["trainer"]).resolve())["strategy"]
    assert strategy["class_path"] == "alignvlm_pl.strategies.fsdp.ShardedStrategy"


@pytest.mark.slow
@pytest.mark.parametrize("path", _files("recipe"), ids=_ids)
def test_every_stage_of_a_recipe_parses_as_a_command_line(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignvlm_pl.cli.lightning_cli import AlignCLI

    monkeypatch.setattr(sys, "argv", ["alignvlm"])
    runs = plan_runs(["--config", str(CONFIGS / "base.yaml"), "--config", str(path)])
    for run, entry in zip(runs, read_stages(path), strict=True):
        with pytest.raises(SystemExit) as stopped:
            AlignCLI.run_command(["fit", *run.options, "--print_config"])
        assert stopped.value.code == 0
        shown = yaml.safe_load(capsys.readouterr().out)
        assert shown["stage"]["name"] == entry.files["stage"].stem
        assert shown["stage"] == {**shown["stage"], **entry.settings("stage")}
        assert (shown["checkpoint_every_n_steps"], shown["checkpoint_every_minutes"]) == (None, 30), "base.yaml"
        assert shown["trainer"]["enable_model_summary"] is False, "base.yaml survives the cluster's file"
        assert shown["trainer"]["precision"] == "bf16-mixed", "cluster"
        assert shown["data"]["class_path"].endswith(_load(entry.files["data"])["class_path"])


# --- parameter tables -----------------------------------------------------------------------------

VISION_PARAMETERS = (
    # patches 14 x 14 x 3 with bias, positions, 27 layers (attention, MLP, two norms), final norm; no pooling head
    (3 * 14 * 14 * 1152 + 1152)
    + 27 * 27 * 1152
    + 27 * (4 * (1152 * 1152 + 1152) + (1152 * 4304 + 4304) + (4304 * 1152 + 1152) + 4 * 1152)
    + 2 * 1152
)
LLM_PARAMETERS = {"1b": 1_235_814_400, "3b": 3_212_749_824, "8b": 8_030_261_248}  # Meta's own counts
WIDTHS = {"1b": 2048, "3b": 3072, "8b": 4096}


def _align_parameters(width: int, *, vision: int = 1152, vocabulary: int = 128_256) -> int:
    """W1 with bias, its norm, W2 without bias, the norm over the vocabulary."""
    return vision * width + width + 2 * width + vocabulary * width + 2 * vocabulary


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "size"), PAPER_RECIPES.items())
def test_tables_of_the_paper_recipes(recipe: str, size: str) -> None:
    from alignvlm_pl.cli.params import tables

    parts = {
        "vision": VISION_PARAMETERS,
        "connector": _align_parameters(WIDTHS[size]),
        "llm": LLM_PARAMETERS[size],
    }
    found = tables(CONFIGS / "recipe" / f"{recipe}.yaml")
    assert len(found) == 3
    for number, table in enumerate(found, start=1):
        trained = {part: 0 if number == 3 and part == "vision" else count for part, count in parts.items()}
        parts_table, _, memory = table.partition("\n\n")
        rows = {line.split()[0]: line.split()[1:] for line in parts_table.splitlines()[3:]}
        assert "a step fits: " in memory
        assert table.startswith(f"stage {number}:")
        assert {part: int(rows[part][0].replace(",", "")) for part in parts} == parts
        assert {part: int(rows[part][1].replace(",", "")) for part in parts} == trained
        assert int(rows["all"][1].replace(",", "")) == sum(trained.values())
        assert rows["vision"][2] == ("frozen" if number == 3 else f"{TABLE_6[f'{number}-{size}'][3]:g}")
