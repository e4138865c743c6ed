"""What every kind of raw data must offer to be packed.

CONTRACT: datamodules/pack reads raw data through these two only; a new source is one class with these methods.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ...shards.sample import SampleError
from ..sources.source import SourceSample


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A piece of the raw data that one process reads by itself: a file, a range of a file, a row group.

    Attributes:
        name: Unique and the same in every run: the order of the samples follows from it.
        payload: What `RawData.read` needs to find it, in plain values.
        rows: Rows in it, where that is known without reading; for the time that is left.
    """

    name: str
    payload: tuple[str | int | None, ...]
    rows: int | None = None


class RawData(Protocol):
    """Raw data of one source. Objects are pickled into the processes that read the parts.

    CONTRACT: it is a dataclass, whose fields name all settings and all input files: an interrupted run is continued
    where its `repr` and the sizes and times of those files are the same (datamodules/prepare/pack/work_folder.py).

    Attributes:
        name: What the data is called, in reports; also the default name of the set where nothing else is given.
        source: The ``source`` of samples whose record names none.
        license: Terms of the data.
    """

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def license(self) -> str: ...

    def parts(self) -> Sequence[Part]:
        """List the parts in a fixed order that does not depend on the number of processes.

        Raises:
            ConfigError: The settings do not fit the data.
            DataError: Input is missing, or of an unknown schema.
        """
        ...

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        """Yield one item for each row of a part, in order: a sample, or what is wrong with the row.

        Pictures must have been decoded to their end (`checked_image`, `checked_image_file`), and messages must name
        file and row. The ``id`` of the record, where it has one, should be unique.

        Raises:
            DataError: Something that makes all rows unusable; packing stops.
        """
        ...

    def input_bytes(self) -> int:
        """Estimate the bytes of all samples with their pictures, for the check of the disk."""
        ...


@runtime_checkable
class PartlySpooled(Protocol):
    """What raw data may have besides, where it gives pictures as paths."""

    def spool_bytes(self) -> int:
        """Estimate the part of `input_bytes` that lies on the disk twice while packing: all but those pictures."""
        ...
