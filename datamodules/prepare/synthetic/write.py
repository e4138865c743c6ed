"""Write datasets of synthetic documents as shards, rendered in parallel, the same bytes for any number of processes."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from alignvlm_pl.errors import ConfigError, nearest
from alignvlm_pl.utils.atomic_files import PARTIAL

from ...shards.manifest import INDEX_SUFFIX, MANIFEST_NAME, Manifest, load_manifest
from ...shards.writer import ShardWriter
from ..pack.processes import run_jobs
from .generate import KINDS, PAGE_KINDS, SOURCE, Document, generate_document
from .lexicon import check_split, lexicon_digest

logger = logging.getLogger(__name__)

GENERATOR_VERSION = 3
"""Raised whenever the same arguments give other documents."""
LICENSE = "CC0-1.0"
DOCUMENT_KINDS = {"form": 1.0, "receipt": 1.0, "table": 1.0, "chart": 1.0}
"""Weights of the kinds of documents to be asked about."""
PAGE_WEIGHTS = {"receipt-page": 3.0, "form-page": 1.0, "table-page": 1.0}
"""Weights of the kinds of whole pages."""
_FEW = 32
"""Documents that are rendered sooner than processes start."""
_PROGRESS_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetPlan:
    """Everything that determines the content of a dataset; most fields as for `generate_document`."""

    name: str  # stem of its shards and keys
    split: str
    num_documents: int
    seed: int = 0  # datasets of other names or seeds share no document
    kinds: dict[str, float]  # weight of each kind of document
    fonts: str = "train"
    width: int = 256
    height: int = 128
    questions_per_document: int = 4
    one_question_per_sample: bool = False  # each turn is a sample of its own with ``references``, for evaluation
    transcription_share: float = 0.1
    fault_share: float = 0.67

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.num_documents < 1:
            raise ConfigError(f"num_documents must be 1 or more, found {self.num_documents}")
        for kind, weight in self.kinds.items():
            if kind not in (known := (*KINDS, *PAGE_KINDS)):
                raise ConfigError(f"kinds of a synthetic dataset: unknown {kind!r}; {nearest(kind, known)}")
            if weight < 0:
                raise ConfigError(
                    f"kinds of a synthetic dataset: weight of {kind} must not be negative, found {weight}"
                )
        if not sum(self.kinds.values()) > 0:
            raise ConfigError("kinds of a synthetic dataset: at least one needs a weight above 0")

    def render(self, index: int) -> Document:
        """Render document `index`; its seed depends on name and seed only."""
        seed = int.from_bytes(sha256(f"{self.name}/{self.seed}/{index}".encode()).digest()[:8], "big")
        kind = Random(seed).choices(list(self.kinds), list(self.kinds.values()))[0]
        shared = ("split", "fonts", "width", "height", "transcription_share", "fault_share")
        settings = {name: getattr(self, name) for name in shared}
        return generate_document(seed, kind=kind, num_questions=self.questions_per_document, **settings)


def write_split(
    out: Path | str,
    *,
    kinds: Mapping[str, float] | Iterable[str] = DOCUMENT_KINDS,
    name: str | None = None,
    processes: int = 2,
    **settings: Any,
) -> Manifest:
    """Render a dataset of documents into a folder of shards; does nothing if it exists already with the same arguments.

    Args:
        out: Folder of the dataset.
        kinds: Kinds of documents, with weights or evenly.
        name: Name of the dataset; the name of the folder where None.
        processes: Processes that render; the bytes do not depend on it.
        settings: Further fields of `DatasetPlan`, at least `split` and `num_documents`.

    Raises:
        ConfigError: An invalid argument, or the folder holds something else.
        DataError: The disk is full, or the dataset that is there is damaged.
    """
    out = Path(out)
    weights = dict(kinds) if isinstance(kinds, Mapping) else dict.fromkeys(kinds, 1.0)
    plan = DatasetPlan(name=name or out.name, kinds=weights, **settings)
    if processes < 1:
        raise ConfigError(f"processes must be 1 or more, found {processes}")
    arguments = {**asdict(plan), "generator": GENERATOR_VERSION, "words": lexicon_digest()}
    if _already_there(out, arguments):
        logger.info("%s: already there", out)
        return load_manifest(out)
    with ShardWriter(out, name=plan.name, source=SOURCE, license=LICENSE) as writer:
        writer.extra["arguments"] = arguments
        workers = processes if plan.num_documents >= _FEW else 1
        with closing(run_jobs(plan.render, range(plan.num_documents), workers=workers)) as documents:
            bar = tqdm(documents, total=plan.num_documents, desc=plan.name, unit="page", mininterval=_PROGRESS_S)
            for document in bar:
                for turn in document.turns if plan.one_question_per_sample else [None]:
                    writer.add(document.record(turn), [document.encoded], [document.extension])
    return load_manifest(out)


def _already_there(out: Path, arguments: Mapping[str, Any]) -> bool:
    """Return whether the folder holds this dataset; raise if it holds anything else."""
    if not out.exists():
        return False
    if not (out / MANIFEST_NAME).exists():
        # Shards without a manifest are what a killed run leaves; the writer replaces them.
        ours = (".tar", PARTIAL, INDEX_SUFFIX)
        foreign = [path.name for path in sorted(out.iterdir()) if not path.name.endswith(ours)]
        if foreign:
            raise ConfigError(
                f"{out} is not empty and holds no synthetic dataset ({foreign[0]}, …); choose another folder"
            )
        return False
    found = load_manifest(out).extra.get("arguments", {})
    for key, value in arguments.items():
        if found.get(key) != value:
            raise ConfigError(
                f"{out} holds another dataset: {key} is {found.get(key)!r} there but {value!r} was given; "
                "remove the folder or choose another one"
            )
    return True
