"""`--connector FILE` on the real command line: it trains, is written to the run's config, and is refused when wrong."""

import json
from pathlib import Path

import pytest
import yaml

FILES = Path(__file__).resolve().parents[2] / "configs" / "model" / "connector"

READ = ("--stage.objective=read", "--stage.lr_llm=null", "--stage.max_steps=2")

pytestmark = pytest.mark.slow


def test_a_file_takes_the_models_place(world, tmp_path):
    run = world.fit(tmp_path / "run", "--connector", FILES / "h-reducer.yaml", "--connector.end_token=true")
    expected = {**yaml.safe_load((FILES / "h-reducer.yaml").read_text("utf-8")), "end_token": True}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["spec"]["connector"] == expected
    assert config["connector"] is None
    written = json.loads((run / "hf" / "config.json").read_text())
    assert (written["connector"], written["tokens_per_tile"]) == (expected, 5)
    # The run's own config says all of it.
    again = ["--config", str(run / "config.yaml"), "--model.weights", str(run / "hf")]
    from alignvlm_pl.cli import main

    assert main(["test", *again, "--run_dir", str(tmp_path / "again")]) == 0


def test_a_recipe_names_it_for_all_its_stages(world, tmp_path):
    for name in ("first", "second"):
        stage = yaml.safe_load((world.root / "stage.yaml").read_text())
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**stage, "name": name, "max_steps": 1}))
    (tmp_path / "small.yaml").write_text("{type: perceiver, depth: 1, num_latents: 3}")
    stages = [{"stage": f"{name}.yaml", "data": str(world.root / "data.yaml")} for name in ("first", "second")]
    recipe = {"model": str(world.root / "model.yaml"), "connector": "small.yaml", "stages": stages}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    from alignvlm_pl.cli import main

    options = ["--config", tmp_path / "recipe.yaml", "--trainer", world.root / "cpu.yaml"]
    options += ["--benchmark.at_stage_end=false", "--run_dir", tmp_path / "run"]
    assert main(["fit", *map(str, options)]) == 0
    for folder in ("1-first", "2-second"):
        written = json.loads((tmp_path / "run" / folder / "hf" / "config.json").read_text())
        assert written["connector"] == {"type": "perceiver", "depth": 1, "num_latents": 3}


def test_the_read_stage_follows_joined_tokens(world, tmp_path):
    align = "--model.spec.connector.pixel_shuffle=2"
    run = world.fit(tmp_path / "run", align, *READ)
    assert json.loads((run / "hf" / "config.json").read_text())["tokens_per_tile"] == 4


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--connector=perceiver", "--connector: there is no file perceiver; did you mean 'perceiver.yaml'?"),
        ("--connector={type: perceiver, dept: 2}", "has no option 'dept'; did you mean 'depth'"),
        (
            "--connector={type: c_abstractor, pool: [12, 12]}",
            "pool=12 x 12 is larger than a tile's grid of 4 x 4",
        ),
        ("--connector={type: align, vocab_rows: 300}", "vocab_rows=300: expected 1 to 259"),
    ],
)
def test_a_wrong_one_is_refused_in_one_line(world, tmp_path, capsys, option, message):
    assert world.run("fit", "--run_dir", tmp_path / "run", option) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    assert len(errors) == 1
    assert message in errors[0]


def test_the_read_stage_refuses_a_connector_that_cannot_be_read(world, tmp_path, capsys):
    options = [*READ, "--connector", FILES / "perceiver.yaml"]
    assert world.run("fit", "--run_dir", tmp_path / "run", *options) == 1
    assert "'perceiver' has no P_vocab to read out; use 'align'" in capsys.readouterr().err
