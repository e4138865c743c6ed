"""Small parquet files of the published schemas, and reading a source to its end."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.storage.stored_files import StoredFile, list_files

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
