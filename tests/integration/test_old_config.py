"""The `config.yaml` that `fit` wrote at a5c9756, before modules, callbacks and checkpoints became what they are."""

from pathlib import Path

from alignvlm_pl.cli import main

WRITTEN = Path(__file__).parents[1] / "golden" / "config-a5c9756.yaml"
GONE = "  enable_checkpointing: false\n"
"""A default of then, which Lightning would refuse beside checkpoints."""


def test_it_trains_and_predicts_once_the_setting_that_is_gone_is_removed(world, tmp_path, capsys):
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    text = WRITTEN.read_text().replace("WORLD", str(world.root)).replace("RUN", str(run))
    config.write_text(text)
    assert main(["fit", "--config", str(config)]) == 1
    assert "trainer.enable_checkpointing=false: a stage is exported from its last" in capsys.readouterr().err
    assert not run.exists()
    config.write_text(text.replace(GONE, ""))
    assert main(["fit", "--config", str(config)]) == 0
    assert (run / "hf" / "stage.json").is_file()
    config.write_text(text)  # the other commands take it as it is
    assert main(["predict", "--config", str(config), "--ckpt_path=last"]) == 0
    assert (run / "predictions" / "held.jsonl").is_file()
