"""WebDataModule: shards in the sample schema as Lightning data; the base of every DataModule here.

Three kinds of datasets: `train` (endless, shuffled, concatenated), `val` (loss, each sample once) and
`benchmarks` (predictions, each sample once). The subclasses define how the members of a tar become a sample.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from alignvlm_pl.errors import AlignVLMError, ConfigError, DataError, nearest

from .loading.benchmark_dataset import BenchmarkDataset, BenchmarkSource
from .loading.collate import Batch, Collator
from .loading.eval_batches import BenchmarkOptions, EvaluationBatches, plan_evaluation
from .loading.loader import ShardLoader, TrainBatches
from .loading.train_data import MixtureSource, Training, packed_rows, require_range
from .loading.workers import start_server
from .shards.decode import Decoder, SkipCounter
from .shards.manifest import Manifest, load_manifest
from .shards.sample_formats import Adapter, read_normal
from .storage.fetching import Policy
from .storage.location import Storage
from .stream.batching import BatchPlanner
from .stream.state import State
from .stream.stream import TrainStream

if TYPE_CHECKING:
    from alignvlm_pl.models.processing import AlignVLMProcessor


class WebDataModule(pl.LightningDataModule):
    """Documents in WebDataset shards in the sample schema (docs/data.md); a dataset is a folder with a manifest.

    Args:
        train: Folders of the training datasets; several are concatenated.
        val: Name -> folder of the datasets whose loss is computed.
        benchmarks: Name -> folder of the datasets whose predictions are scored; `{folder: …, benchmark: …}` also names
            the benchmark that a dataset belongs to, a registered one or an import path.
        batch_size: Training samples per device and step.
        eval_batch_size: Samples per device in a batch of `val` and `benchmarks`.
        num_workers: Worker processes per device; 0 loads in the training process.
        seed: Seed of the order of the training samples; null: the global one, of `seed_everything`.
        shuffle_buffer: Training samples that are permuted together; 0 keeps the order within a shard.
        length_window: Training batches that are sorted by length together, so that they are padded less; 1: none.
        token_budget: Pack training samples into rows of at most this many tokens, text and visual; each sees itself
            alone. A batch then has `batch_size` rows. null: a row for each sample.
        visual_share: Share of the visual tokens, above 0, at most 1, by which samples are packed and sorted by length.
            Where `connector.collapse` leaves out blanks, the `connector/kept_share` of the logs; a row may then be
            longer than `token_budget`. 1 counts all, which no row exceeds.
        pack_window: Training samples that are packed together.
        max_text_length: Largest number of text tokens of a sample, without vision tokens; null: the stage's.
        max_skipped_share: Share of invalid training samples, 0 to 1, above which the run stops.
        max_unlabelled_share: The same of samples with no supervised token: no answer, or all of it truncated.
        strict: Stop at the first invalid training sample.
        mixture: Name -> datasets and weight of the sources of a weighted mixture, in place of `train`.
        resume: `exact`: a checkpoint of other data or settings is refused. `coarse`: it resumes at the same share of
            the epoch.
        stall_seconds: Time without a batch after which the stacks of all processes are printed; after three times as
            long the workers are killed, and the run ends with an error. 0: never.
        sources: Train only on samples of these sources; null: all.
        prompts: Benchmark, or ``benchmark/part`` -> file with the prompt to use in place of the benchmark's;
            ``{question}`` in it stands for the question.
        cache: Folder for copies of remote datasets; null: `$ALIGNVLM_CACHE/shards`.
        fetch_retries: Attempts after the first at a file that cannot be fetched.
    """

    def __init__(
        self,
        train: list[str | Path] | None = None,
        val: dict[str, str | Path] | None = None,
        benchmarks: dict[str, str | Path | BenchmarkSource] | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 2,
        seed: int | None = None,
        shuffle_buffer: int = 512,
        length_window: int = 1,
        token_budget: int | None = None,
        visual_share: float = 1.0,
        pack_window: int = 256,
        max_text_length: int | None = None,
        max_skipped_share: float = 0.01,
        max_unlabelled_share: float = 0.01,
        strict: bool = False,
        sources: list[str] | None = None,
        mixture: dict[str, MixtureSource] | None = None,
        resume: Literal["exact", "coarse"] = "exact",
        stall_seconds: float = 600.0,
        prompts: dict[str, Path] | None = None,
        cache: Path | None = None,
        fetch_retries: int = 5,
    ) -> None:
        super().__init__()
        require_range(1, batch_size=batch_size, eval_batch_size=eval_batch_size, length_window=length_window)
        require_range(1, token_budget=token_budget or 1, pack_window=pack_window)
        require_range(0, num_workers=num_workers, shuffle_buffer=shuffle_buffer)
        require_range(0, stall_seconds=stall_seconds, fetch_retries=fetch_retries)
        require_range(0, 1, max_skipped_share=max_skipped_share, max_unlabelled_share=max_unlabelled_share)
        if not 0 < visual_share <= 1:
            raise ConfigError(f"data.init_args.visual_share={visual_share}: expected a share above 0, at most 1")
        if token_budget and length_window > 1:
            raise ConfigError(
                "data.init_args: token_budget and length_window exclude each other: packed rows are all of one length"
            )
        if train and mixture:
            raise ConfigError("data.init_args: give train or mixture, not both")
        self.train = list(train or [])
        self.mixture = {
            name: MixtureSource(**source) if isinstance(source, Mapping) else source
            for name, source in (mixture or {}).items()
        }
        self.val = dict(val or {})
        self.benchmarks = {name: BenchmarkSource.from_config(given) for name, given in (benchmarks or {}).items()}
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.length_window = length_window
        self.token_budget = token_budget
        self.visual_share = visual_share
        self.pack_window = pack_window
        self.max_text_length = max_text_length
        self.max_skipped_share = max_skipped_share
        self.max_unlabelled_share = max_unlabelled_share
        self.strict = strict
        self.resume = resume
        self.stall_seconds = stall_seconds or None
        self.sources = None if sources is None else frozenset(sources)
        self.prompts = dict(prompts or {})
        self.storage = Storage(cache=cache, policy=Policy(retries=fetch_retries))
        self._manifests: dict[str, Manifest] = {}
        self._streams: dict[str, TrainStream] = {}
        self._attached: tuple[AlignVLMProcessor, int, int] | None = None
        self._benchmark_options = BenchmarkOptions()
        self.training: Training | None = None
        self._state: State | None = None

    def adapter(self) -> Adapter:
        """Return how the members of a tar become the sample schema; subclasses add their source's format."""
        return read_normal

    def attach(self, processor: "AlignVLMProcessor", *, rank: int = 0, world_size: int = 1) -> "WebDataModule":
        """Use a processor, a rank and a world size without a trainer."""
        self._attached = (processor, rank, world_size)
        return self

    def setup(self, stage: str | None = None) -> None:
        """Read and verify all manifests the stage needs, before any weights are loaded; DataError where one fails."""
        if self.num_workers:
            start_server()  # it imports while manifests and weights are read
        training = self._training_folders() if stage in (None, "fit") else []
        for read in self._reads(training):
            read()
        if training:
            self.steps_per_epoch()

    def missing(self) -> list[str]:
        """Return what keeps `fit` from reading the datasets, one message for each; reads the manifests alone."""
        training, found = self._training_folders(), []
        if not training:
            found.append("data.init_args.train holds no dataset; give the folders to train on")
        for read in self._reads(training):
            try:
                read()
            except AlignVLMError as error:
                found.append(str(error))
        return list(dict.fromkeys(found))

    def _training_folders(self) -> list[str | Path]:
        return [*self.train, *(folder for source in self.mixture.values() for folder in source.sets)]

    def _reads(self, training: Sequence[str | Path]) -> list[Callable[[], object]]:
        """Return what reads and verifies one manifest, benchmark or setting each; it raises where that is invalid."""
        folders = [*training, *self.val.values(), *(source.folder for source in self.benchmarks.values())]
        names = sorted({prompt.split("/")[0] for prompt in self.prompts} | set(self.benchmarks))
        return [
            *(partial(self._manifest, folder) for folder in folders),
            *(partial(self.benchmark_dataset, name) for name in names),
            partial(self._check_sources, training),
        ]

    def validation_samples(self) -> dict[str, int]:
        """Return the number of samples of each dataset of `val`, by its name; reads the manifests alone."""
        return {name: self._manifest(folder).num_samples for name, folder in self.val.items()}

    def teardown(self, stage: str | None = None) -> None:
        """Stop the training workers."""
        if self.training is not None:
            self.training.loader.close()
            self.training = None

    def steps_per_epoch(self, world_size: int | None = None) -> int:
        """Micro batches of an epoch on each rank: rows // (batch size x ranks), in whole optimizer steps.

        Of packed rows it is an estimate, as many as the tokens of the datasets fill. By default for the trainer's world
        size. A step with more samples than the datasets have is a ConfigError.
        """
        size, ranks = self.batch_size, world_size or self._rank_and_world_size()[1]
        stream = self._stream()
        rows = len(stream)
        if self.token_budget:
            share = self.visual_share
            filled = packed_rows(stream, processor=self.processor, budget=self.token_budget, visual_share=share)
            rows = max(filled, size * ranks)
        if rows < size * ranks:
            raise ConfigError(
                f"data.init_args.batch_size={size} on {ranks} ranks needs {size * ranks} samples per step, "
                f"but the training datasets have {rows}; use a smaller batch or more data"
            )
        steps = rows // (size * ranks)
        return steps - steps % self._accumulation() or steps

    def train_dataloader(self) -> ShardLoader | DataLoader[Batch]:
        """Endless training batches, from where a checkpoint stopped; an epoch is `steps_per_epoch()` of them.

        With `trainer.overfit_batches` an epoch repeats the first batches.
        """
        rank, world_size = self._rank_and_world_size()
        self.teardown()
        counter = SkipCounter(max_share=self.max_skipped_share, max_unlabelled=self.max_unlabelled_share)
        batches = TrainBatches(
            stream=self._stream(),
            planner=self._planner(),
            collator=self._collator(),
            decoder=Decoder(adapter=self.adapter()),
            counter=None if self.strict else counter,
        )
        self.training = Training.begin(
            batches,
            rank=rank,
            world_size=world_size,
            state=self._state,
            mode=self.resume,
            num_batches=self.steps_per_epoch(),
            num_workers=self.num_workers,
            step_batches=self._accumulation(),
            **self._loading(),
        )
        overfit = 0 if self.trainer is None else self.trainer.overfit_batches  # type: ignore[attr-defined]
        return self._repeated(overfit) if overfit else self.training.loader

    def _repeated(self, batches: float) -> DataLoader[Batch]:
        """Return an epoch that repeats its first batches, their number or share of an epoch, and stop the workers."""
        share = isinstance(batches, float)
        steps = self.steps_per_epoch() if share else int(batches)
        assert self.training is not None
        first = list(islice(iter(self.training.loader), max(1, int(steps * batches)) if share else steps))
        self.teardown()
        return DataLoader([first[step % len(first)] for step in range(steps)], batch_size=None)  # type: ignore[arg-type]

    def state_dict(self) -> State:
        """Return the state of all ranks in the training stream, in plain types; all ranks must call it."""
        return {} if self.training is None else self.training.state_dict()

    def load_state_dict(self, state_dict: State) -> None:
        """Resume from a checkpoint, on any number of ranks; takes effect in `train_dataloader`."""
        self._state = state_dict

    def set_benchmark_options(self, **options: Any) -> None:
        """Set what the loaders of benchmarks serve from now on; the arguments are those of `BenchmarkOptions`."""
        self._benchmark_options = BenchmarkOptions(**options)

    def val_dataloader(self) -> list[ShardLoader]:
        """Loss batches of each dataset of `val`, then prediction batches of each benchmark that is served."""
        losses = []
        for name, folder in self.val.items():
            manifest = self._manifest(folder)
            losses.append(
                self._evaluation_loader(manifest, range(manifest.num_samples), self._collator(), dataset=name)
            )
        return [*losses, *self.predict_dataloader()]

    def test_dataloader(self) -> list[ShardLoader]:
        """As `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[ShardLoader]:
        """Prediction batches of each benchmark that is served."""
        options = self._benchmark_options
        return [
            self.benchmark_dataloader(name, limit=options.subset, done=options.predicted.get(name, ()))
            for name in self.benchmarks
            if options.names is None or name in options.names
        ]

    def benchmark_dataloader(self, name: str, *, limit: int | None = None, done: Collection[int] = ()) -> ShardLoader:
        """Prediction batches of one of `benchmarks`: each sample once over all ranks, see `plan_evaluation`.

        Of the first `limit` samples, None for all, without the positions `done`, which are the same on all ranks. An
        unknown name is a ConfigError.
        """
        chosen, options = self.benchmark_dataset(name), self._benchmark_options
        longest = (chosen.benchmark.max_new_tokens if chosen.benchmark else None) or options.max_new_tokens
        task = "read" if name in options.read else "generate"
        collator = self._collator(generation=True, benchmark=chosen.benchmark)
        positions = chosen.positions(limit=limit, done=done)
        return self._evaluation_loader(
            chosen.manifest, positions, collator, dataset=name, task=task, max_new_tokens=longest
        )

    def benchmark_dataset(self, name: str) -> BenchmarkDataset:
        """Return one of the benchmarks; raise ConfigError for an unknown name."""
        if name not in self.benchmarks:
            raise ConfigError(
                f"benchmark '{name}' has no folder in data.init_args.benchmarks; {nearest(name, self.benchmarks)}"
            )
        source = self.benchmarks[name]
        return BenchmarkDataset.from_manifest(name, self._manifest(source.folder), self.prompts, source.benchmark)

    def benchmark_size(self, name: str, *, limit: int | None = None) -> int:
        """Return the samples of one benchmark over all ranks: the number of predictions that it must have."""
        return len(self.benchmark_dataset(name).positions(limit=limit))

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Training samples that this rank has skipped so far: source -> skip reason -> number."""
        found = {} if self.training is None else self.training.loader.skipped
        return {source: dict(reasons) for source, reasons in found.items()}

    @property
    def wait_seconds(self) -> float:
        """Seconds that training on this rank has waited for batches so far."""
        return 0.0 if self.training is None else self.training.loader.wait_seconds

    def _evaluation_loader(
        self, manifest: Manifest, positions: Sequence[int], collator: Collator, **task: Any
    ) -> ShardLoader:
        rank, world_size = self._rank_and_world_size()
        plan = plan_evaluation(positions, batch_size=self.eval_batch_size, rank=rank, world_size=world_size)
        decoder, num_workers = Decoder(adapter=self.adapter()), min(self.num_workers, len(plan))
        dataset = EvaluationBatches(manifest=manifest, plan=plan, decoder=decoder, collator=collator, **task)
        return ShardLoader(dataset, num_batches=len(plan), num_workers=num_workers, **self._loading())

    def _loading(self) -> dict[str, Any]:
        """Settings of all loaders. Pinned memory only where the trainer runs on a GPU: it would start CUDA."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {"stall_seconds": self.stall_seconds, "pin_memory": on_gpu}

    def _collator(self, **options: Any) -> Collator:
        limit, stage = self.max_text_length, self._stage()
        if limit is None and stage is not None:
            limit = int(stage.max_text_length)
        return Collator(processor=self.processor, max_text_length=limit, visual_share=self.visual_share, **options)

    @property
    def processor(self) -> "AlignVLMProcessor":
        """The attached processor, else that of the trainer's module; ConfigError where there is neither."""
        if self._attached is not None:
            return self._attached[0]
        module = getattr(self.trainer, "lightning_module", None)
        if module is None:
            raise ConfigError(f"{type(self).__name__} has no processor: give it to a Trainer or call attach()")
        processor: AlignVLMProcessor = module.processor
        return processor

    def _stream(self) -> TrainStream:
        """Return the stream of training samples; raise ConfigError where there is no dataset."""
        if not self.train and not self.mixture:
            raise ConfigError("data.init_args.train names no folder; give at least one dataset to train on")
        given = self.mixture or {"train": MixtureSource(sets=self.train)}
        seed = self._order_seed()
        if seed not in self._streams:  # choosing sources reads the indexes of all shards
            sources = tuple(source.load(name, self._manifest, self.sources) for name, source in given.items())
            self._streams[seed] = TrainStream(sources=sources, seed=seed, buffer=self.shuffle_buffer)
        return self._streams[seed]

    def _planner(self) -> BatchPlanner:
        return BatchPlanner(
            batch_size=self.batch_size,
            length_window=self.length_window,
            token_budget=self.token_budget,
            pack_window=self.pack_window,
            seed=self._order_seed(),
        )

    def _order_seed(self) -> str:
        """Seed of the training order, another one for each stage."""
        stage, seed = self._stage(), self.seed
        if seed is None:  # Lightning's `seed_everything` leaves it there
            seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        return str(seed) if stage is None else f"{seed}/{stage.name}"

    def _stage(self) -> Any:
        """Return the stage of the trainer's module; None outside of a fit."""
        return None if self.trainer is None else getattr(self.trainer.lightning_module, "stage", None)

    def _rank_and_world_size(self) -> tuple[int, int]:
        """Rank and world size of the trainer; (0, 1) without one."""
        if self._attached is not None:
            return self._attached[1:]
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _accumulation(self) -> int:
        """Micro batches of an optimizer step."""
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches

    def _manifest(self, folder: str | Path) -> Manifest:
        if str(folder) not in self._manifests:
            self._manifests[str(folder)] = load_manifest(folder, storage=self.storage)
        return self._manifests[str(folder)]

    def _check_sources(self, folders: Sequence[str | Path]) -> None:
        known = {source for folder in folders for source in self._manifest(folder).sources}
        for source in sorted((self.sources or frozenset()) - known) if known else ():
            raise DataError(f"data.init_args.sources: no sample of source '{source}'; {nearest(source, known)}")
