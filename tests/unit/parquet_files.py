"""Small parquet files of the published schemas, and reading a source to its end."""

import io
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.sample import SampleError, check_record, message_text
from datamodules.sources.source import SourceSample
from datamodules.sources.stored_files import StoredFile, list_files

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(width: int = 4, ending: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 3), (width, 0, 0)).save(buffer, ending)
    return buffer.getvalue()


def image(width: int = 4, **changes: Any) -> dict[str, Any]:
    return {"bytes": png(width), "path": None} | changes


def write(path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    return path


def files(path: Path | str) -> tuple[StoredFile, ...]:
    return tuple(list_files(str(path), ".parquet"))


def read(raw: Any) -> tuple[list[SourceSample], Counter[str]]:
    """Samples and counts of bad rows, as another process would read them: the source and its parts are pickled."""
    samples, bad = [], Counter()
    for part in pickle.loads(pickle.dumps(list(raw.parts()))):
        assert all(value is None or isinstance(value, str | int) for value in part.payload)
        found = list(pickle.loads(pickle.dumps(raw)).read(part))
        assert len(found) == part.rows
        for item in found:
            if isinstance(item, SampleError):
                bad[item.reason] += 1
            else:
                check_record(item.record, num_images=len(item.images), where="test")
                samples.append(item)
    return samples, bad


def texts(sample: SourceSample) -> list[str]:
    return [message_text(turn) for turn in sample.record["messages"]]


# BigDocs


def bigdocs_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "sample_id": f"2107.0451{number}v2.page_7.tab_2",
        "image": image(number + 4),
        "query": ["Write a caption for the table in the image."],
        "annotations": [f"Table {number}: Ablation."],
        "query_info": '{"source": "template", "license": "CC-BY-4.0"}',
        "annotation_info": '{"source": "arXiv LaTeX"}',
        "image_info": '{"source": "rendered from arXiv PDF"}',
    } | changes
