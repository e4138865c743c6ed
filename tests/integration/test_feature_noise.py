"""`FeatureNoise` in a test run: no noise changes nothing, noise turns the outputs by what is computed by hand."""

import json

import pytest
import torch
from torch.nn import functional as F

from callbacks.feature_noise import FeatureNoise


def answers_of(world, folder, **options):
    callback = {"class_path": "callbacks.feature_noise.FeatureNoise", "init_args": options}
    extra = [f"--trainer.callbacks={json.dumps([callback])}"] if options else []
    assert world.run("test", "--run_dir", folder, *extra) == 0
    return [json.loads(line) for line in (folder / "predictions" / "held.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_no_noise_changes_nothing_and_noise_is_the_same_each_time(world, tmp_path):
    plain = answers_of(world, tmp_path / "plain")
    assert answers_of(world, tmp_path / "zero", sigma=0.0) == plain
    assert abs(json.loads((tmp_path / "zero" / "noise.json").read_text())["cosine_distance"]) < 1e-6
    first, second = (answers_of(world, tmp_path / name, sigma=3.0) for name in ("first", "second"))
    assert first == second
    found = json.loads((tmp_path / "first" / "noise.json").read_text())
    assert found["tokens"] > 0 and found["cosine_distance"] > 1e-4
    assert found["sigma"] == 3.0 and found["relative"] is False


@pytest.mark.parametrize("relative", [False, True])
def test_the_distance_is_that_of_the_connector_by_hand(relative, tmp_path):
    from alignvlm_pl.models.build import build_model, build_processor
    from alignvlm_pl.models.tiny import tiny_spec

    torch.manual_seed(0)
    spec = tiny_spec(tmp_path, connector={"type": "mlp"})
    connector = build_model(spec, build_processor(spec)).connector
    features, table = 2 * torch.randn(3, 16, 32), torch.randn(259, 64)
    noise = 0.5 * torch.randn(features.shape, generator=torch.Generator().manual_seed(7))
    expected = features + noise * (features.std() if relative else 1)
    callback = FeatureNoise(0.5, relative=relative, seed=7)
    with torch.no_grad():
        clean, noisy = connector(features, table).embeds, connector(expected, table).embeds
        callback.attach(connector)
        found = connector(features, table).embeds
        callback.detach()
        assert torch.equal(connector(features, table).embeds, clean)
    torch.testing.assert_close(found, noisy)
    distance = (1 - F.cosine_similarity(clean, noisy, dim=-1)).sum()
    assert callback.sums == pytest.approx([float(distance), 48])


def test_it_is_not_for_fit_and_a_negative_sigma_is_named(world, tmp_path, capsys):
    callback = [{"class_path": "callbacks.feature_noise.FeatureNoise", "init_args": {"sigma": 1.0}}]
    words = ("--run_dir", tmp_path / "run", f"--trainer.callbacks={json.dumps(callback)}")
    assert world.run("fit", *words) == 1
    assert "FeatureNoise is for validate, test and predict" in capsys.readouterr().err
    callback[0]["init_args"]["sigma"] = -1.0
    assert world.run("test", "--run_dir", tmp_path / "run", f"--trainer.callbacks={json.dumps(callback)}") == 1
    assert "FeatureNoise sigma=-1.0: expected at least 0" in capsys.readouterr().err
