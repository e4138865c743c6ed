"""LightningCLI for AlignVLM: its groups, what follows from other values, and errors that name the nearest key."""

import inspect
import logging
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import Namespace, set_loader
from lightning.pytorch import callbacks, loggers, profilers, strategies
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from yaml import YAMLError

import datamodules
from callbacks.averaged_weights import AveragedWeights, require_whole_parameters
from callbacks.benchmark_evaluation import BenchmarkEvaluation
from callbacks.connector_health import ConnectorHealth
from callbacks.data_health import DataHealth
from callbacks.finite_losses import FiniteLosses
from callbacks.gain_calibration import GainCalibration
from callbacks.last_checkpoint import CHECKPOINT, LastCheckpoint
from callbacks.ledger import Ledger
from callbacks.preemption import Preemption
from callbacks.progress import TrainingProgress
from callbacks.random_state import RandomState
from callbacks.stage_transition import StageTransition
from callbacks.throughput import Throughput

from ..errors import AlignVLMError, CheckpointError, ConfigError, TrainingError, nearest
from ..strategies.checkpoint_io import AtomicCheckpointIO
from ..strategies.fsdp import ShardedStrategy, unsupported
from ..training.export import EXPORT_FOLDER, FILE_SIZE, RECORD, check_size, export_checkpoint
from ..training.module import AlignVLMModule, check_precision
from ..training.stage import Stage, accumulation, require_parent
from ..utils.atomic_files import printable
from ..utils.run_owner import owned
from . import old_names
from .messages import shorten, unknown_key
from .slurm import check_allocation, cluster_plugins, in_slurm, is_first_rank, requeued, restarts

# Imported, so that a bare class name in a config resolves.
DATA_MODULES = tuple(getattr(datamodules, name) for name in datamodules.__all__)
CALLBACKS = {
    "benchmark": BenchmarkEvaluation,
    "progress": TrainingProgress,
    "connector_health": ConnectorHealth,
    "throughput": Throughput,
}
"""Groups of the configuration whose callbacks are always there."""
OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "run_dir": (str, "runs/default", "Folder of everything the run writes."),
    "stages": (list[dict[str, Any]] | None, None, "Stages of a recipe."),
    "checkpoint_every_n_steps": (int | None, 500, "Optimizer steps between checkpoints; null: any number."),
    "checkpoint_every_minutes": (float | None, None, "Minutes between checkpoints, by the clock of rank 0; null: any."),
    "checkpoint_keep_last": (int, 1, "How many of the newest checkpoints are kept."),
    "checkpoint_keep_every_n_steps": (int | None, None, "Keep checkpoints of multiples of this for good; null: none."),
    "max_shard_size": (str, FILE_SIZE, "Largest file of the exported weights."),
    "preemption_every_n_steps": (int, 1, "Optimizer steps between two checks for SIGUSR1 or SIGTERM on any rank."),
}
"""Options beside the groups: type, default and help."""
_CLASSES = {
    "data": datamodules.__all__,
    "trainer.callbacks": callbacks.__all__,
    "trainer.logger": loggers.__all__,
    "trainer.strategy": (*strategies.__all__, ShardedStrategy.__name__),
    "trainer.profiler": profilers.__all__,
}
_OR_NAME = {"strategy": Strategy, "profiler": profilers.Profiler, "accelerator": Accelerator}
"""Settings of the trainer that are a name or a class."""
_YAML = "alignvlm_pl"
"""Name of this project's way to read YAML among those of jsonargparse."""
set_loader(_YAML, old_names.load, exceptions=(YAMLError,))
LAST = ("last", "latest")
"""As `--ckpt_path`: the run's own last checkpoint; `fit` starts afresh where there is none yet."""

log = logging.getLogger(__name__)
_DERIVED = {  # setting of the trainer -> its untouched value and the setting that it follows from
    "max_steps": (-1, "stage.max_steps"),
    "max_epochs": (None, "stage.epochs"),
    "gradient_clip_val": (None, "stage.gradient_clip_norm"),
    "accumulate_grad_batches": (1, "stage.global_batch_size"),
}
_REFUSED = {
    "GradientAccumulationScheduler": "accumulation follows from stage.global_batch_size",
    "LearningRateFinder": "each part has a learning rate of its own: set stage.lr_vision, lr_connector, lr_llm",
    "BatchSizeFinder": "set data.init_args.batch_size; stage.global_batch_size stays as it is",
    "StochasticWeightAveraging": "set stage.ema_decay, such as 0.999, for averaged weights",
}
"""Lightning's callbacks that do not go with a stage -> what to use instead."""
_ABOVE_0 = (
    "accumulate_grad_batches",
    "check_val_every_n_epoch",
    "gradient_clip_val",
    "limit_train_batches",
    "val_check_interval",
)
_LEAST = {"log_every_n_steps": 0, "num_sanity_val_steps": -1}
_NOT_0 = ("max_epochs", "max_steps")

logging.getLogger("lightning").handlers.clear()  # its lines go to the root's handler, and would be there twice


class AlignParser(LightningArgumentParser):
    """A parser that takes no abbreviations and whose errors are one line; unknown keys name the nearest known one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "parser_mode": _YAML, **kwargs})
        self.commands: list[AlignParser] = []
        """Parsers of the subcommands, for the parser of the whole command line."""

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the options of a command; Lightning's table, which has every score once a dataset, is off."""
        added: list[str] = super().add_method_arguments(*args, **kwargs)
        if "verbose" in added:
            self.set_defaults({"verbose": False})
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a ConfigError instead of printing the usage."""
        words = [word for word in getattr(self, "args", None) or () if word.startswith("--")]
        self._refuse_unknown(word[2:].partition("=")[0].removesuffix("+") for word in words)
        if not self.exit_on_error:  # the parser of a class's options: the outer one names the setting
            super().error(message, ex)
        raise ConfigError(old_names.answer_file(shorten(str(message), _CLASSES))) from ex

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Check the types of a configuration; an unknown key is a ConfigError."""
        try:
            super().validate(namespace, *args, **kwargs)
        except KeyError:
            keys = [key for key, _ in namespace.items() if not key.endswith("__")]
            self._refuse_unknown([key.split(".", 1)[-1] for key in keys] if self.commands else keys)
            raise

    def known_keys(self) -> set[str]:
        """Dotted names of all settings, those of the subcommands and of the DataModules included."""
        keys = {key for parser in self.commands for key in parser.known_keys()} | set(self.get_defaults().keys())
        if "data" in keys:
            options = {name for module in DATA_MODULES for name in inspect.signature(module).parameters}
            keys |= {"data.class_path", *(f"data.init_args.{name}" for name in options)}
        return keys

    def _refuse_unknown(self, keys: Iterable[str]) -> None:
        """Raise for the first of dotted names that is no setting, no group of settings, and no part of one."""
        known = self.known_keys() | ({"help", "print_config", "config", "subcommand"} if self.exit_on_error else set())
        for key in keys:
            heads = {key[:end] for end, letter in enumerate(key) if letter == "."}
            if key in known or heads & known or any(name.startswith(f"{key}.") for name in known):
                continue
            if not self.exit_on_error:  # the parser of a class's options: the outer one names class and setting
                super().error(unknown_key(key, known))
            raise ConfigError(unknown_key(key, known))


def build_parts(values: dict[str, Any], *, source: str, **kinds: type) -> Any:
    """Build the objects of some keys of a configuration, `source`, with the checks and errors of the full command line.

    Classes that are no dataclass are given by `class_path` and `init_args`, or by their settings alone.
    """
    parser = AlignParser(prog=source)
    for key, kind in kinds.items():
        add = parser.add_class_arguments if is_dataclass(kind) else parser.add_subclass_arguments
        add(kind, key)
    return parser.instantiate(parser.parse_object(old_names.renamed({key: values[key] for key in kinds})))


class RunConfig(SaveConfigCallback):
    """Save the configuration in `run_dir`, whichever logger there is."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it; Lightning calls this on rank 0 alone."""
        path = Path(trainer.default_root_dir) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(path), skip_unset=False, overwrite=True, multifile=False)


class AlignCLI(LightningCLI):
    """Model x data x stage x benchmark x cluster, composed from files."""

    @classmethod
    def run_command(cls, args: list[str]) -> "AlignCLI":
        """Parse and run one subcommand; what is invalid in its configuration is a ConfigError."""
        command = args[0]
        old_names.check_files(args)
        with ExitStack() as stack:
            return cls(
                AlignVLMModule,
                pl.LightningDataModule,
                command=command,
                stack=stack,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
                save_config_callback=RunConfig,
                # A requeued job finds the config of its first start in the run folder; `test` keeps that of `fit`.
                save_config_kwargs={
                    "overwrite": True,
                    "save_to_log_dir": False,
                    "config_filename": "config.yaml" if command == "fit" else f"config-{command}.yaml",
                },
                parser_class=AlignParser,
                args=args,
            )

    def __init__(self, *args: Any, command: str, stack: ExitStack, **kwargs: Any) -> None:
        """Parse and run `command`; `stack` is left at the end of the run."""
        self._command, self._stack = command, stack
        try:
            super().__init__(*args, **kwargs)
        except (MisconfigurationException, RuntimeError, ValueError) as error:
            if not _raised_by_lightning(error):
                raise
            raise ConfigError(_first_line(error)) from error

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # bound: it knows which one runs
        """The one that runs: the parsers of all four take four times as long to build."""
        return {self._command: super().subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Groups beside model, data and trainer."""
        assert isinstance(self.parser, AlignParser)
        assert isinstance(parser, AlignParser)
        self.parser.commands.append(parser)
        # Built in instantiate_trainer: `validate` and `test` need no stage, but take a config that has one.
        parser.add_class_arguments(Stage, "stage", instantiate=False, default={"name": ""})
        for name, (kind, default, text) in OPTIONS.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        text = "Connector in place of the model's: a file in configs/model/connector/."
        parser.add_argument("--connector", type=dict[str, Any] | None, default=None, sub_configs=True, help=text)
        for name, callback in CALLBACKS.items():
            parser.add_class_arguments(callback, name, sub_configs=True)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, or with `--print_config` print the configuration and what follows from it, as YAML comments."""
        try:
            super().parse_arguments(parser, args)
        except SystemExit:
            others = [word for word in args if word.partition("=")[0] != "--print_config"]
            if len(others) < len(args) and others[:1] == ["fit"]:
                with suppress(ConfigError):  # a configuration that is incomplete is printed without them
                    super().parse_arguments(parser, others)
                    print(_follows(self.config["fit"]), end="")
            raise
        # Taken out until before_instantiate_classes: LightningCLI would load all of the checkpoint, and put its
        # hyper-parameters in the place of what the user has set.
        settings = self.config[self.config.subcommand]
        seed = settings.seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise ConfigError(f"seed_everything={seed}: expected a number from 0 to {2**32 - 1}")
        self.ckpt_path, settings.ckpt_path = settings.ckpt_path, None

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work, before anything is loaded: settings, the run folder, a checkpoint to resume from."""
        config = self.config[self.subcommand]
        config.ckpt_path = self.ckpt_path
        if config.connector is not None:
            # Moved, so that the saved config says it once.
            config.model.init_args.spec.connector, config.connector = config.connector, None
        if (config.data.get("init_args") or {}).get("seed", 0) is None:
            config.data.init_args.seed = int(config.seed_everything)  # here, so that the saved config has it
        if config.trainer.default_root_dir is not None:
            raise ConfigError("trainer.default_root_dir follows from run_dir; set run_dir instead")
        _check_names(config.trainer)
        check_trainer(config.trainer, fit=self.subcommand == "fit")
        check_precision(str(config.trainer.precision), fit=self.subcommand == "fit")
        check_allocation(os.environ, num_nodes=config.trainer.num_nodes, devices=count_devices(config.trainer))
        fit, run_dir = self.subcommand == "fit", Path(config.run_dir)
        if fit:
            self._check_stage(config, run_dir)
        elif config.ckpt_path is None and config.model.init_args.weights is None:
            log.warning(
                "%s: neither --ckpt_path nor --model.weights is given, so the model answers untrained", self.subcommand
            )
        if not config.run_dir.strip():
            raise ConfigError("run_dir is empty: expected a folder, such as runs/NAME")
        if str(run_dir) != printable(str(run_dir)):
            raise ConfigError(
                f"run_dir={run_dir}: expected a name in UTF-8, which event files are written by; rename it"
            )
        _check_writable(run_dir)
        if not config.trainer.fast_dev_run:
            self._own(run_dir)
        if fit and (run_dir / CHECKPOINT).parent.exists():
            _check_writable((run_dir / CHECKPOINT).parent)
        if config.ckpt_path in LAST:  # `fit` resumes from it in any case, if there is one
            config.ckpt_path = None if fit else str(run_dir / CHECKPOINT)
        # Checkpoints hold tensors and plain types: one that would run code when it is read is refused.
        if config.weights_only is None:
            config.weights_only = True
        if config.ckpt_path is not None:
            _check_checkpoint(Path(config.ckpt_path))

    def _own(self, run_dir: Path) -> None:
        """Own the run folder until the end, for all ranks; an evaluation may run beside a fit."""
        if not is_first_rank(os.environ):
            return
        name = "owner.json" if self.subcommand == "fit" else "owner-evaluation.json"
        job = os.environ.get("SLURM_JOB_ID") if in_slurm(os.environ) else None
        self._stack.enter_context(owned(run_dir / name, job=job, restarts=restarts(os.environ)))

    def _check_stage(self, config: Any, run_dir: Path) -> None:
        check_size("max_shard_size", config.max_shard_size)
        if not config.stage.name:
            raise ConfigError("fit needs a stage: --stage configs/stage/NAME.yaml, or a recipe with `stages`")
        require_parent(config.stage.name, parent=config.stage.parent, init_from=config.stage.init_from)
        if (run_dir / EXPORT_FOLDER / RECORD).is_file():
            if requeued(os.environ):
                log.info("stage in %s is finished", run_dir)
                raise SystemExit(0)
            raise CheckpointError(
                f"run_dir {run_dir} holds a finished stage; choose another run_dir, or remove it to train again"
            )

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; errors of this project's classes keep their own message."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            causes = list(_causes(error))
            if own := next((cause for cause in causes if isinstance(cause, AlignVLMError)), None):
                raise own from None
            if any(isinstance(cause, ImportError) for cause in causes):  # a package that an optional class needs
                raise ConfigError(shorten(str(error))) from error
            if refused := next(filter(_raised_by_lightning, causes), None):  # an argument of a class of Lightning's
                raise ConfigError(_first_line(refused)) from error
            raise

    def after_instantiate_classes(self) -> None:
        """Resume from the last checkpoint of an unfinished stage."""
        config = self._settings
        last = Path(config.run_dir) / CHECKPOINT
        if self.subcommand != "fit" or config.ckpt_path is not None or not os.path.lexists(last):
            return
        if not last.exists():
            raise CheckpointError(
                f"{last} points to {os.readlink(last)}, which is gone: give another state by --ckpt_path, or remove "
                "the link and the stage starts again from its beginning"
            )
        _check_checkpoint(last)
        config.ckpt_path = str(last)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer; the saved configuration does not repeat what follows from other settings."""
        given, root = self._settings["trainer"], self._settings["run_dir"]
        settings: dict[str, Any] = {
            "default_root_dir": root,
            "plugins": [*_as_list(given["plugins"]), AtomicCheckpointIO(), *cluster_plugins(os.environ)],
        }
        if given["logger"] in (None, True):
            settings["logger"] = TensorBoardLogger(root, name="", version="")
        callbacks = {name: self._settings[name] for name in CALLBACKS}
        own_bar = any(isinstance(callback, ProgressBar) for callback in _as_list(given["callbacks"]))
        if own_bar or given["enable_progress_bar"] is False:
            del callbacks["progress"]
        chosen = list(callbacks.values())
        if self.subcommand == "fit":
            stage = self._stage()
            for key, (untouched, source) in _DERIVED.items():
                if given[key] != untouched:
                    log.info("trainer.%s=%s is used in place of %s", key, given[key], source)
            settings |= _stage_settings(stage, given, batch_size=getattr(self.datamodule, "batch_size", 1))
            if given["val_check_interval"] is None:
                settings |= callbacks["benchmark"].validation_interval(settings["accumulate_grad_batches"])
            chosen = self._fit_callbacks(stage, chosen, saves=not given["fast_dev_run"])
        else:
            chosen.append(FiniteLosses())
        try:
            trainer = super().instantiate_trainer(
                **settings, callbacks=[*_as_list(given["callbacks"]), *chosen], **kwargs
            )
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise ConfigError(f"trainer: {_first_line(error)}") from error
        if self.subcommand == "fit":
            for part in stage.adapters:
                require_whole_parameters(trainer, f"stage.lora.{part}")
            if 0 < given["overfit_batches"] < 1 and not given["fast_dev_run"]:
                # A share of the training set: the same one of a small validation set may be no batch at all.
                limit = given["limit_val_batches"]
                trainer.limit_val_batches = 1.0 if limit is None else limit
        return trainer

    def _fit_callbacks(self, stage: Stage, chosen: list[Callback], *, saves: bool) -> list[Callback]:
        settings = self._settings
        self.preemption = Preemption(settings["preemption_every_n_steps"])
        self.last = LastCheckpoint(
            self.preemption,
            settings["checkpoint_every_n_steps"],
            keep_last=settings["checkpoint_keep_last"],
            keep_every_n_steps=settings["checkpoint_keep_every_n_steps"],
            every_minutes=settings["checkpoint_every_minutes"],
        )
        first: list[Callback] = [Ledger()] if saves else []
        first += [GainCalibration(**stage.calibrate)] if stage.calibrate else []
        first += [AveragedWeights(stage.ema_decay)] if stage.ema_decay else []
        always = [DataHealth(), StageTransition(stage), RandomState(), FiniteLosses(), self.preemption]
        return [*first, *chosen, *always, *([self.last] if saves else [])]

    def after_fit(self) -> None:
        """Export the last checkpoint, once training has ended; a run killed here exports when it is started again."""
        trainer = self.trainer
        if self.last.path is None:
            if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning
                return
            raise TrainingError(
                "no step was trained, so nothing is exported: give trainer.max_time and stage.max_minutes more time"
            )
        self.preemption.leave_if_requested(trainer)
        problem = ""
        if trainer.is_global_zero:
            try:
                self._export(self.last.path)
            except AlignVLMError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):  # the others wait here for rank 0
            raise CheckpointError(problem)

    def _export(self, checkpoint: Path) -> None:
        folder = Path(self._settings["run_dir"]) / EXPORT_FOLDER
        record = export_checkpoint(
            checkpoint,
            folder,
            spec=self.model.spec,
            processor=self.model.processor,
            weights=self.model.weights,
            trained=self.model.net if self._stage().adapters else None,
            max_shard_size=self._settings["max_shard_size"],
        )
        log.info("stage %s: %d steps, weights in %s", record["stage"], record["steps"], folder)

    @property
    def _settings(self) -> Any:
        """The subcommand's configuration, its classes instantiated."""
        return self.config_init[self.subcommand]

    def _stage(self) -> Stage:
        return _stage_of(self._settings)


def _stage_of(config: Any) -> Stage:
    return Stage(**{field.name: config["stage"][field.name] for field in fields(Stage)})


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether Lightning's own code has raised the error: none that it calls, no fault of a device or of the network."""
    if type(error) not in (MisconfigurationException, RuntimeError, ValueError) or str(error).startswith("CUDA"):
        return False
    module = ""
    for frame, _ in walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return isinstance(error, MisconfigurationException) or module.startswith(
        ("lightning.pytorch.", "lightning.fabric.")
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_trainer(trainer: Any, *, fit: bool) -> None:
    """Refuse callbacks of Lightning's that change what the stage decides, strategies that training does not follow, and
    intervals and limits with which Lightning divides by zero, trains nothing or uphill, by a ConfigError.
    """
    for callback in trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]:
        module, _, name = str(getattr(callback, "class_path", "")).rpartition(".")
        if module.startswith("lightning.pytorch.") and name in _REFUSED:
            raise ConfigError(f"trainer.callbacks: {name} does not go with a stage; {_REFUSED[name]}")
    numbers = {name: trainer[name] for name in (*_ABOVE_0, *_NOT_0, *_LEAST) if isinstance(trainer[name], (int, float))}
    for name, value in numbers.items():
        if (name in _NOT_0 and value == 0) or (name in _ABOVE_0 and not value > 0):
            raise ConfigError(f"trainer.{name}={value}: expected a number above 0")
        if value < _LEAST.get(name, value):
            raise ConfigError(f"trainer.{name}={value}: expected at least {_LEAST[name]}")
    if trainer.barebones:
        raise ConfigError(
            "trainer.barebones=true turns checkpoints, logs and progress off, which a stage needs; remove it, and see "
            "perf/train_step.py for the bare speed of a step"
        )
    if fit and trainer.enable_checkpointing is False:
        raise ConfigError(
            "trainer.enable_checkpointing=false: a stage is exported from its last checkpoint; remove the setting, "
            "which configs of earlier versions hold as a default"
        )
    if isinstance(trainer.strategy, str) and trainer.strategy.startswith(("fsdp", "deepspeed")):
        raise unsupported(trainer.strategy)  # Lightning would ask for a GPU, or for a package, first


def _check_names(trainer: Any) -> None:
    """Refuse an invalid class where a name may stand: the parser takes the text of one for a name."""
    for key, kind in _OR_NAME.items():
        text = trainer[key]
        if isinstance(text, str) and text.lstrip().startswith("{"):
            parser = AlignParser(prog=f"trainer.{key}")
            parser.add_subclass_arguments(kind, f"trainer.{key}")
            parser.parse_object({"trainer": {key: old_names.load(text)}})
    name = trainer.strategy
    known = {"auto", *StrategyRegistry.available_strategies()}
    if isinstance(name, str) and name.lower() not in known and not name.startswith(("fsdp", "deepspeed")):
        common = nearest(name, {"auto", "ddp", "ddp_spawn"} & known)
        raise ConfigError(f"trainer.strategy={name}; {common}; or a class, as configs/cluster/fsdp.yaml names one")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _follows(config: Any) -> str:
    settings = _stage_settings(_stage_of(config), config.trainer, batch_size=config.data.init_args.get("batch_size", 1))
    lines = (f"# trainer.{key}: {value}   ({_DERIVED[key][1]})" for key, value in settings.items())
    return "\n".join(["# What follows:", *lines, f"# trainer.default_root_dir: {config.run_dir}   (run_dir)", ""])


def _stage_settings(stage: Stage, trainer: dict[str, Any], *, batch_size: int) -> dict[str, Any]:
    """Settings of the trainer that follow from the stage; one that the user has given the trainer wins."""
    given = {key: trainer[key] for key, (untouched, _) in _DERIVED.items() if trainer[key] != untouched}
    length = {"max_steps": stage.max_steps or -1, "max_epochs": -1 if stage.max_steps else stage.epochs}
    if given.keys() & length:
        length = {"max_steps": -1, "max_epochs": -1}
    found = {**length, "gradient_clip_val": stage.gradient_clip_norm, **given}
    if "accumulate_grad_batches" not in given:
        num_devices = count_devices(trainer) * trainer["num_nodes"]
        found["accumulate_grad_batches"] = accumulation(stage.global_batch_size, batch_size, num_devices)
    return found


def count_devices(trainer: Any) -> int:
    """Return the devices of a node behind the trainer's settings, for "auto" those that the machine has.

    Raises a ConfigError for a number below 1.
    """
    devices = trainer["devices"]
    if isinstance(devices, str) and "," in devices:  # "0,1"
        devices = [word for word in devices.split(",") if word.strip()]
    if isinstance(devices, (list, tuple)):
        devices = len(devices)
    if str(devices) in ("auto", "-1"):
        if trainer["accelerator"] == "cpu":
            return 1  # as Lightning has it, whatever else the machine has
        import torch

        return max(torch.cuda.device_count(), 1)
    for name, value in (("devices", devices), ("num_nodes", trainer["num_nodes"])):
        if not str(value).isdecimal() or int(value) < 1:
            raise ConfigError(f"trainer.{name}={trainer[name]}: expected at least 1 (devices also: a list, or auto)")
    return int(devices)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_text("x")
        probe.unlink(missing_ok=True)  # a rank of another machine may have the same number
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}; set another run_dir") from error


def _check_checkpoint(path: Path) -> None:
    if path.is_dir():  # written in shards by a strategy, which checks it
        return
    if not path.is_file():
        raise CheckpointError(f"ckpt_path {path}: there is no such file; a run leaves {CHECKPOINT} in its run_dir")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"checkpoint {path} is damaged or no checkpoint ({path.stat().st_size} bytes); remove it, the stage then "
            "starts again from its beginning"
        )
