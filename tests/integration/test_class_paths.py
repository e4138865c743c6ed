"""Classes of the user, named by their class_path: model, data, connector, optimizer, metric, benchmark."""

import json

import pytest
import yaml

CODE = '''
import lightning.pytorch as pl
import torch

from alignvlm_pl.benchmarks import Benchmark, Scoring
from alignvlm_pl.metrics.base import mean_metric
from alignvlm_pl.models.align import AlignConnector
from alignvlm_pl.models.connectors.base import Connector
from alignvlm_pl.training.module import AlignVLMModule
from datamodules import DocDownstreamDataModule

ALWAYS = mean_metric("always", lambda prediction, references, rule: 1.0, ("plain",))

MINE = Benchmark(
    name="mine", title="Mine", split="test", size=7, scorings=(Scoring(metric="own_parts_of_mine.ALWAYS"),)
)


class Reader(AlignConnector):
    """As ALIGN: its weights are probabilities of text tokens."""


class Scaled(AlignVLMModule):
    def __init__(self, scale: float = 1.0, **options):
        super().__init__(**options)
        self.scale = scale

    def batch_loss(self, batch):
        print(f"scaled by {self.scale}")
        return super().batch_loss(batch)


class Plain(pl.LightningDataModule):
    """No WebDataModule: any loader of the model's batches."""

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def train_dataloader(self):
        source = DocDownstreamDataModule(train=[self.folder], batch_size=2, num_workers=0, shuffle_buffer=0)
        source.attach(self.trainer.lightning_module.processor)
        batches = iter(source.train_dataloader())
        return torch.utils.data.DataLoader([next(batches) for _ in range(4)], batch_size=None)


class Mean(Connector):
    def __init__(self, vision_dim, text_dim, vocab_size, *, factor: float = 1.0):
        super().__init__()
        self.factor = factor
        self.projection = torch.nn.Linear(vision_dim, text_dim)

    def project(self, features):
        return self.factor * self.projection(features)
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The working directory of a user, with `own_parts_of_mine.py`."""
    import sys

    (tmp_path / "own_parts_of_mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_parts_of_mine", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_module_of_the_users_own_trains(world, own, capsys):
    run = world.fit(own / "run", "--model=own_parts_of_mine.Scaled", "--model.scale=2", "--stage.max_steps=1")
    assert "scaled by 2.0" in capsys.readouterr().out
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert saved["class_path"] == "own_parts_of_mine.Scaled"
    assert saved["init_args"]["scale"] == 2


def test_any_lightning_data_module_trains(world, own):
    plain = f"{{class_path: own_parts_of_mine.Plain, init_args: {{folder: {world.root / 'train'}}}}}"
    assert world.run("fit", f"--run_dir={own / 'run'}", f"--data={plain}", "--stage.max_steps=1") == 0
    assert (own / "run/hf/model.safetensors").is_file()


def test_a_connector_by_its_import_path_trains(world, own):
    connector = "{type: own_parts_of_mine.Mean, factor: 0.5}"
    run = world.fit(own / "run", f"--connector={connector}", "--stage.max_steps=1")
    written = json.loads((run / "hf/config.json").read_text())["connector"]
    assert written == {"type": "own_parts_of_mine.Mean", "factor": 0.5}


def test_an_optimizer_by_its_class_path_gets_the_stages_groups(world, tmp_path, monkeypatch):
    import torch

    made = []
    build = torch.optim.SGD.__init__

    def noted(self, groups, **options):
        made.append(([(group["name"], group["lr"]) for group in groups], options))
        build(self, groups, **options)

    monkeypatch.setattr(torch.optim.SGD, "__init__", noted)
    sgd = "{class_path: torch.optim.SGD, init_args: {lr: 0.5, momentum: 0.9}}"
    run = world.fit(tmp_path / "run", f"--stage.optimizer={sgd}", "--stage.lr_llm=null", "--stage.max_steps=1")
    ((groups, options),) = made
    assert {name.split("/")[0] for name, _ in groups} == {"vision", "connector"}
    assert {lr for _, lr in groups} == {1e-3}, "the stage's, not the default of init_args"
    assert options["momentum"] == 0.9
    assert json.loads((run / "hf/stage.json").read_text())["settings"]["optimizer"]["class_path"] == "torch.optim.SGD"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{class_path: torch.optim.Sgd}", "stage.optimizer: 'torch.optim.Sgd' cannot be imported"),
        ("{class_path: torch.nn.Linear}", "stage.optimizer: 'torch.nn.Linear' is no torch.optim.Optimizer"),
        ("{class_path: torch.optim.SGD, init_args: {beta: 1}}", "stage.optimizer: torch.optim.SGD: "),
        ("{name: SGD}", "stage.optimizer={'name': 'SGD'}: expected {class_path: "),
    ],
)
def test_what_is_no_optimizer_is_refused(world, tmp_path, capsys, given, said):
    assert world.run("fit", f"--run_dir={tmp_path / 'run'}", f"--stage.optimizer={given}") == 1
    assert said in capsys.readouterr().err


def test_a_metric_by_its_import_path_scores_a_custom_dataset(world, own, capsys):
    metrics = "--benchmark.metrics=[own_parts_of_mine.ALWAYS, exact_match]"
    assert world.run("test", f"--run_dir={own / 'run'}", metrics) == 0
    results = json.loads((own / "run/results.json").read_text())
    assert results["benchmarks"]["held"] == {"num": 5, "always": 1.0, "exact_match": 0.0}
    assert world.run("test", f"--run_dir={own / 'run2'}", "--benchmark.metrics=[own_parts_of_mine.torch]") == 1
    assert "is no Metric but a module" in capsys.readouterr().err


def test_a_benchmark_by_its_import_path_scores_a_dataset(world, own, capsys):
    held = f"{{held: {{folder: {world.root / 'held'}, benchmark: own_parts_of_mine.MINE}}}}"
    options = [f"--run_dir={own / 'run'}", "--data.init_args.val={}", "--data.init_args.benchmarks", held]
    assert world.run("test", *options) == 0
    results = json.loads((own / "run/results.json").read_text())
    assert results["benchmarks"]["held"] == {"num": 5, "always": 1.0}
    assert results["incomplete"]["held"] == ["5 of 7 questions"], "the benchmark's own size"
    assert world.run("test", *options[:-1], held.replace("MINE", "ALWAYS")) == 1
    assert "is no Benchmark but a Metric" in capsys.readouterr().err

    (own / "predictions.jsonl").write_text('{"key": "a", "prediction": "x", "references": ["y"]}')
    from alignvlm_pl.cli import main

    score = ["score", "--benchmark=own_parts_of_mine.MINE", f"--predictions={own / 'predictions.jsonl'}", "--json"]
    assert main(score) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["always"] == 1.0


def test_a_benchmark_in_a_manifest_is_a_registered_one(own, tmp_path):
    """A manifest may come from elsewhere, and an import path in it would run code."""
    from alignvlm_pl.errors import ConfigError
    from datamodules.loading.benchmark_dataset import BenchmarkDataset

    class Manifest:
        extra = {"benchmark": "own_parts_of_mine.MINE"}

    with pytest.raises(ConfigError, match=r"there is no benchmark .own_parts_of_mine\.MINE"):
        BenchmarkDataset.from_manifest("held", Manifest(), {})


def test_a_connector_by_its_import_path_reads_pages(world, own):
    connector = "{type: own_parts_of_mine.Reader}"
    options = [f"--run_dir={own / 'run'}", f"--connector={connector}", "--benchmark.readout_sets=[held]"]
    assert world.run("test", *options) == 0
    assert set(json.loads((own / "run/results.json").read_text())["benchmarks"]["held"]) >= {"num", "cer"}
