"""A run must not train for hours and then fail on a name.

Sources: OpenADMET/openadmet-models#327, Lightning-AI/pytorch-lightning#524.
"""

import pytest

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.training.module import check_objective
from alignvlm_pl.training.stage import Stage
from callbacks.benchmark_evaluation import BenchmarkEvaluation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["anlss"]}, "there is no metric 'anlss'.*did you mean 'anls'"),
        ({"judge": "os:sep"}, "judge='os:sep' is no function but str; expected module:function"),
        ({"judge": "os:nothing"}, "judge"),
        ({"every_n_steps": 0}, "benchmark.every_n_steps=0: expected at least 1, or null"),
        ({"subset": 0}, "benchmark.subset=0: expected at least 1, or null"),
        ({"max_new_tokens": 0}, "benchmark.max_new_tokens=0: expected at least 1$"),
        ({"page_images": -1}, "benchmark.page_images=-1: expected at least 0"),
        ({"readout_pages": -1}, "benchmark.readout_pages=-1: expected at least 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_of_benchmarks(options, message):
    with pytest.raises(ConfigError, match=message):
        BenchmarkEvaluation(**options)


def test_names_of_datasets():
    callback = BenchmarkEvaluation(readout_sets=["linez"])
    with pytest.raises(ConfigError, match=r"readout_sets names 'linez', which is not in data.*; did you mean 'lines'"):
        callback.check_readout_sets({"lines": "a", "forms": "b"})
    callback.check_readout_sets({})  # a stage that evaluates nothing


@pytest.mark.parametrize("settings", [{"objective": "read"}, {"readout_weight": 0.3}], ids=str)
def test_a_stage_that_reads_what_the_connector_does_not_have(settings):
    stage = Stage(name="some", lr_connector=1e-3, **settings)
    with pytest.raises(ConfigError, match="stage 'some': connector 'mlp' has no P_vocab to read out; use 'align'"):
        check_objective(stage, {"type": "mlp"})
    check_objective(stage, {"type": "align"})
    check_objective(Stage(name="some", lr_connector=1e-3), {"type": "mlp"})
