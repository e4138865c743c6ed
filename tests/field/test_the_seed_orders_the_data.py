"""The global seed seeds the order of the data, and a resume under another one is refused.

Sources: webdataset/webdataset#372, PR#347, #39, pytorch/torchtune PR#65.
"""

import json
from pathlib import Path

import yaml

from tests.integration.checkpoint_files import error_of, unfinished_run


def keys(folder: Path) -> list[list[str]]:
    lines = map(json.loads, (folder / "ledger/rank00000.jsonl").read_text().splitlines())
    return [line["keys"] for line in lines if "step" in line]


def test_seeds_train_other_orders_and_the_saved_config_repeats_its_own(world, trained, tmp_path):
    options = ["--data.init_args.shuffle_buffer=16", "--stage.max_steps=2"]
    orders = [keys(world.fit(tmp_path / seed, *options, f"--seed_everything={seed}")) for seed in ("0", "7")]
    assert orders[0] != orders[1]
    assert yaml.safe_load((tmp_path / "7/config.yaml").read_text())["data"]["init_args"]["seed"] == 7
    own = world.fit(tmp_path / "own", *options, "--seed_everything=7", "--data.init_args.seed=0")
    assert keys(own) == orders[0], "a seed of its own counts"


def test_a_resume_under_another_seed_is_refused_or_logged(world, trained, tmp_path, capsys, caplog):
    run = unfinished_run(trained, tmp_path / "run")
    options = ["--run_dir", run, "--stage.max_steps=3", "--seed_everything=7", "--benchmark.at_stage_end=false"]
    assert "seed was 0/all, is 7/all" in error_of(capsys, world.run("fit", *options))
    assert world.run("fit", *options, "--data.init_args.seed=0") == 0
    assert "seed_everything=7 has no effect: the run resumes with the random numbers of 0" in caplog.text
