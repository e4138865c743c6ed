"""Wrong command lines: exit status, one short line, and the nearest right key."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignvlm_pl.cli import COMMANDS, main
from alignvlm_pl.cli.messages import shorten, unknown_key

ROOT = Path(__file__).parents[2]
TRAINING = "alignvlm_pl.cli.training"  # whose options are those of the model's classes
DATA = "data: Problem with given class_path 'datamodules.DocDownstreamDataModule': "
MODEL = "model: Problem with given class_path 'alignvlm_pl.AlignVLMModule': "
KEYS = {
    "trainer.max_steps",
    "trainer.devices",
    "data.init_args.batch_size",
    "stage.lr_llm",
    "stage.name",
    "run_dir",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Configs that parse; no weights or shards are looked at before the errors below."""
    folder = tmp_path_factory.mktemp("configs")
    contents = {
        "model": {"spec": {"vision": {"pretrained": "none"}, "llm": {"pretrained": "none"}}},
        "data": {"class_path": "DocDownstreamDataModule", "init_args": {"train": ["none"], "batch_size": 4}},
        "stage": {"name": "one", "lr_llm": 1e-3, "global_batch_size": 8},
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    for name, content in contents.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def failed(capsys, folder, *options, command="fit"):
    given = {f"--{name}": f"--{name}={folder / name}.yaml" for name in ("model", "data", "stage", "trainer")}
    assert main([command, *given.values(), f"--run_dir={folder / 'run'}", *options]) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 300
    assert not (folder / "run").exists() or not list((folder / "run").iterdir())
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("option", "key", "near"),
    [
        ("--trainer.max_step=3", "trainer.max_step", "trainer.max_steps"),
        ("--trainr.devices=3", "trainr.devices", "trainer.devices"),
        ("--stage.max_step=3", "stage.max_step", "stage.max_steps"),
        ("--stag.max_steps=3", "stag.max_steps", "stage.max_steps"),
        ("--lr_llm=3", "lr_llm", "stage.lr_llm"),
        ("--run_dri=x", "run_dri", "run_dir"),
        ("--trainer.batch_size=3", "trainer.batch_size", "data.init_args.batch_size"),
        ("--benchmark.metrix=[anls]", "benchmark.metrix", "benchmark.metrics"),
    ],
)
def test_misspelt_option_names_the_nearest_key(capsys, files, option, key, near):
    assert failed(capsys, files, option) == f"unknown key {key!r}; did you mean {near!r}?"


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        (
            "stage",
            {"name": "x", "lr_connectr": 1.0},
            "unknown key 'stage.lr_connectr'; did you mean 'stage.lr_connector'?",
        ),
        (
            "stage",
            {"name": "x", "trainible": True},
            "unknown key 'stage.trainible'; the nearest known one is 'stage.",
        ),
        (
            "data",
            {"class_path": "DocDownstreamDataModule", "init_args": {"evalbatch_size": 2}},
            f"{DATA}unknown key 'evalbatch_size'; did you mean 'eval_batch_size'?",
        ),
        (
            "data",
            {"class_path": "DocDownstramDataModule"},
            "data: there is no class 'DocDownstramDataModule'; did you mean 'DocDownstreamDataModule'?",
        ),
        (
            "config",
            {"trainr": {"devices": 1}},
            "unknown key 'trainr.devices'; did you mean 'trainer.devices'?",
        ),
        ("config", {"seed_everythin": 1}, "unknown key 'seed_everythin'; did you mean 'seed_everything'?"),
    ],
)
def test_misspelt_key_in_a_file_names_the_nearest_key(capsys, files, tmp_path, option, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content))
    assert failed(capsys, files, f"--{option}", str(path)).startswith(message)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--data.class_path=torch.nn.Linear",
            "data: Import path torch.nn.Linear does not correspond to a subclass of",
        ),
        ("--data.init_args.batchsize=3", f"{DATA}unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("--model.weigths=x", f"{MODEL}unknown key 'weigths'; did you mean 'weights'?"),
        (
            "--model.spec.vison.pretrained=x",
            f"{MODEL}unknown key 'spec.vison.pretrained'; did you mean 'spec.vision.pretrained'?",
        ),
        (
            "--model=nowhere.Mine",
            "model: Problem with given class_path 'nowhere.Mine': No module named 'nowhere'",
        ),
        ("--data.batchsize=3", f"{DATA}unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("--data.init_args.train=tars/x", f"{DATA}train: Expected list (found tars/x)"),
        ("--data.init_args.batch_size=four", f"{DATA}batch_size: Expected int. Got value: four"),
        (
            "--data=nowhere.dm.Mine",
            "data: Problem with given class_path 'nowhere.dm.Mine': No module named 'nowhere'",
        ),
        (
            "--trainer.callbacks=[{class_path: nowhere.Mine}]",
            "trainer.callbacks: Problem with given class_path 'nowhere.Mine': No module named 'nowhere'",
        ),
        (
            "--trainer.callbacks=[{class_path: EarlyStopping, init_args: {montior: x}}]",
            "trainer.callbacks: Problem with given class_path 'lightning.pytorch.callbacks.EarlyStopping': unknown key "
            "'montior'; did you mean 'monitor'?",
        ),
        (
            "--trainer.callbacks.class_path=EarlyStopping",
            "trainer.callbacks: Problem with given class_path 'lightning.pytorch.callbacks.EarlyStopping': missing: "
            "monitor",
        ),
        (
            "--trainer.logger.class_path=CSVLogger",
            "trainer.logger: Problem with given class_path 'lightning.pytorch.loggers.CSVLogger': missing: save_dir",
        ),
        ("--benchmark.metrics=[nope]", "there is no metric 'nope'; did you mean 'pope'?"),
        ("--model.lr=1e-4", f"{MODEL}unknown key 'lr'; there are activation_checkpointing, attention, "),
        (
            "--trainer.precision=fp8",
            "trainer.precision=fp8 is not supported; use bf16-mixed, or 32-true on a device without bfloat16",
        ),
        (
            "--stage.lr=1e-4",
            "unknown key 'stage.lr'; there are stage.lr_connector, stage.lr_llm, stage.lr_vision",
        ),
        ("--stage.max_steps=abc", "stage.max_steps: Expected int (found abc)"),
        ("--stage.schedule=cosin", "stage.schedule='cosin'; did you mean 'cosine'?"),
        ("--stage.name=", "fit needs a stage: --stage configs/stage/NAME.yaml"),
        (
            "--stage.global_batch_size=6",
            "stage.global_batch_size=6 is not a multiple of data batch_size 4 x 1 devices",
        ),
        (
            "--data.init_args.batch_size=0",
            "data.init_args.batch_size=0: expected at least 1",
        ),
        (
            "--trainer.default_root_dir=x",
            "trainer.default_root_dir follows from run_dir; set run_dir instead",
        ),
        ("--trainer.strategy=dpp", "trainer.strategy=dpp; did you mean 'ddp'?"),
        ("--trainer.strategy=fsdp", "trainer.strategy fsdp is not supported; configs/cluster/fsdp.yaml"),
        ("--trainer.strategy=deepspeed_stage_3", "trainer.strategy deepspeed_stage_3 is not supported"),
        (
            "--trainer.precision=16-mixed",
            "trainer.precision=16-mixed is not supported in fit; use bf16-mixed",
        ),
        ("--max_shard_size=nonsense", "max_shard_size=nonsense: expected a size such as 5GB"),
        ("--max_shard_size=0GB", "max_shard_size=0GB: expected a size such as 5GB"),
        (
            "--stage=none.yaml",
            "--stage: there is no file none.yaml; did you mean 'ema.yaml'? known: 1.yaml, 2.yaml, 3.yaml",
        ),
        (
            "--connector=nope.yaml",
            "--connector: there is no file nope.yaml; did you mean 'mlp.yaml'? known: align-plain.yaml, ",
        ),
        (
            "--trainer.callbacks=EarlyStoping",
            "trainer.callbacks: there is no class 'EarlyStoping'; did you mean 'Early",
        ),
        (
            "--trainer.callbacks=[{class_path: EarlyStoping}]",
            "trainer.callbacks: there is no class 'EarlyStoping'; did",
        ),
        (
            "--trainer.callbacks=lightning.pytorch.callbacks.Timr",
            "trainer.callbacks: Problem with given class_path 'lightning.pytorch.callbacks.Timr': module "
            "'lightning.pytorch.callbacks' has no attribute 'Timr'; did you mean 'Timer'?",
        ),
        ("--trainer.callbacks=[5]", "trainer.callbacks: Expected a class, by its class_path (found [5])"),
        ("--trainer.logger=CSVLoger", "trainer.logger: there is no class 'CSVLoger'; did you mean 'CSVLogger'?"),
        ("--trainer.logger=7", "trainer.logger: there is no class '7'; give it as package.module.Class"),
        ("--trainer.max_steps=[1]", "trainer.max_steps: Expected int. Got value: [1]"),
        ("--trainer.barebones=true", "trainer.barebones=true turns checkpoints, logs and progress off"),
        (
            "--trainer.strategy={class_path: alignvlm_pl.strategies.fsdp.ShardedStrategy, init_args: {reshard_lm: no}}",
            "trainer.strategy: Problem with given class_path 'alignvlm_pl.strategies.fsdp.ShardedStrategy': unknown "
            "key 'reshard_lm'; did you mean 'reshard_llm'?",
        ),
        (
            "--trainer.strategy={class_path: ShardedStrateg}",
            "trainer.strategy: there is no class 'ShardedStrateg'; did",
        ),
        ("--seed_everything=-1", "seed_everything=-1: expected a number from 0 to 4294967295"),
        ("--run_dir=", "run_dir is empty: expected a folder"),
    ],
)
def test_values_that_cannot_be_meant(capsys, files, option, message):
    assert failed(capsys, files, option).startswith(message)


def test_a_class_whose_package_is_not_installed_is_named(capsys, files):
    logger = "{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project: x}}"
    said = failed(capsys, files, f"--trainer.logger={logger}")
    assert "'lightning.pytorch.loggers.WandbLogger': Requirement 'wandb" in said
    assert "Expected" not in said, "no types that were tried beside the class"


@pytest.mark.parametrize("option", ["config", "model", "data", "stage", "trainer", "benchmark", "connector"])
def test_an_empty_file_is_named(capsys, files, tmp_path, option):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert failed(capsys, files, f"--{option}={path}") == f"{path} is empty: expected settings"


def test_a_recipe_of_no_stages_is_refused(capsys, files, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stages: []\n")
    assert failed(capsys, files, f"--config={path}").startswith(f"{path}: `stages` is empty; list one")


@pytest.mark.parametrize("words", [[], ["prepare"], ["shards"]], ids=str)
def test_half_a_command_fails(capsys, words):
    assert main(words) != 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert "is missing; there are " in captured.err


def test_a_tar_is_no_dataset(capsys, tmp_path):
    (tmp_path / "x-00000.tar").write_bytes(b"")
    assert main(["shards", "verify", str(tmp_path / "x-00000.tar")]) == 1
    assert "x-00000.tar is a file: give the folder of the dataset" in capsys.readouterr().err


def test_an_empty_file_is_no_checkpoint(capsys, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"")
    assert main(["describe", str(tmp_path / "last.ckpt")]) == 1
    assert "last.ckpt is damaged or no checkpoint (empty, cut off" in capsys.readouterr().err


def test_unknown_command(capsys):
    assert main(["fti"]) == 2
    assert "did you mean 'fit'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "test"])
def test_nothing_given_says_what_is_missing(capsys, command):
    assert main([command]) == 1
    assert capsys.readouterr().err == "error: missing: data, model; give --data FILE --model FILE\n"


def test_later_files_and_overrides_win(capsys, files, tmp_path):
    (tmp_path / "late.yaml").write_text("name: late\nmax_steps: 5\n")
    given = [f"--{name}={files / name}.yaml" for name in ("model", "data", "stage")]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *given, f"--stage={tmp_path / 'late.yaml'}", "--stage.init_from", "X", "--print_config"])
    assert ended.value.code == 0
    stage = yaml.safe_load(capsys.readouterr().out)["stage"]
    assert (stage["name"], stage["max_steps"], stage["lr_llm"], stage["init_from"]) == ("late", 5, 1e-3, "X")


def test_a_message_of_the_parser_loses_the_types_it_tried():
    message = (
        'Parser key "stage.max_steps":\n  Does not validate against any of the Union subtypes\n  Subtypes: [x]\n'
        "  Errors:\n    - Expected a <class 'int'>\n    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'str'>"
    )
    assert shorten(message) == "stage.max_steps: Expected int"


def test_the_nearest_key_is_sought_in_its_group_first():
    assert unknown_key("stage.nam", KEYS).endswith("did you mean 'stage.name'?")
    assert unknown_key("run_dirr", KEYS).endswith("did you mean 'run_dir'?")
    assert unknown_key("stage.qqqq", KEYS).endswith("there are stage.lr_llm, stage.name")
    many = {f"stage.key{letter}" for letter in "abcdefghij"}
    assert unknown_key("stage.qqqq", many).partition("the nearest known one is 'stage.key")[1]


@pytest.mark.parametrize("command", [["--help"], ["prepare", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(command, unbuffered):
    """As in `alignvlm --help | head -0`."""
    import os

    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    program = [sys.executable, str(ROOT / "cli.py"), *command]
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, timeout=100)
    os.close(write)
    assert done.stderr == ""


@pytest.mark.parametrize("command", sorted(name for name, (module, _) in COMMANDS.items() if module != TRAINING))
def test_options_are_listed_without_torch(command):
    program = (
        f"import sys\nfrom alignvlm_pl.cli import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass"
    )
    program += "\nprint('loaded', *{'lightning', 'torch', 'transformers'}.intersection(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1].split() == ["loaded"], done.stderr
