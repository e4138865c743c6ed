"""`Sample` -> encoded conversation -> `Batch` (alignvlm_pl/preprocessing/batch.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from alignvlm_pl.benchmarks import Benchmark
from alignvlm_pl.errors import DataError, NothingToLearnError
from alignvlm_pl.preprocessing.batch import Batch, document_bounds, supervised_positions, visual_positions
from alignvlm_pl.preprocessing.chat import IGNORE_INDEX

from ..shards.sample import UNLABELLED, Message, Sample, SampleError, last_question

if TYPE_CHECKING:
    from alignvlm_pl.models.processing import AlignVLMProcessor


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """A sample with its encoding, and its position in the training stream or in its dataset."""

    sample: Sample
    encoded: Any
    position: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Collator:
    """Encode samples and put them into batches for a loss; for `generation`, left padded prompts without an answer.

    Of `max_text_length` text tokens at most, vision tokens not counted; None: no limit. A `benchmark` sets the prompt.
    `visual_share` is the share of the visual tokens that the LLM is expected to run on, by which lengths are counted.
    With the processor's `image_token_id` and `tokens_per_tile` placeholders are checked and found here; without, by the
    model.
    """

    processor: "AlignVLMProcessor"
    max_text_length: int | None = None
    generation: bool = False
    benchmark: Benchmark | None = None
    visual_share: float = 1.0

    def encode(self, sample: Sample, *, token_budget: int | None = None) -> EncodedSample:
        """Encode one conversation of at most `token_budget` tokens; None: no limit.

        Raises:
            SampleError: The processor refuses it, for example because no supervised token fits, or it is too long.
        """
        messages = self._prompt(sample) if self.generation else answered_messages(sample.messages, sample.references)
        images = _in_order(messages, sample.images)
        limit = self.max_text_length
        try:
            encoded = self.processor.encode(messages, images, max_text_length=limit, generation=self.generation)
        except DataError as error:
            reason = UNLABELLED if isinstance(error, NothingToLearnError) else "not_encodable"
            raise SampleError(f"sample '{sample.key}' of {sample.source}: {error}", reason) from error
        if token_budget is not None:
            length = self._expected(len(encoded.input_ids), _in_order(messages, sample.sizes))
            if length > token_budget:
                raise SampleError(
                    f"sample '{sample.key}' of {sample.source} has {length} tokens, which no row of "
                    f"token_budget={token_budget} can hold; raise it, or lower max_text_length or the number of tiles",
                    "longer_than_budget",
                )
        return EncodedSample(sample=sample, encoded=encoded)

    def count_tokens(self, record: Mapping[str, Any], sizes: Sequence[tuple[int, int]]) -> int:
        """Count the tokens of a training record from the sizes of its images; raise SampleError as `encode`."""
        messages = answered_messages(record["messages"], record.get("references") or [])
        try:
            ordered = _in_order(messages, sizes)
            found = self.processor.count_tokens(messages, ordered, max_text_length=self.max_text_length)
            return self._expected(found, ordered)
        except (DataError, IndexError) as error:
            raise SampleError(str(error), "not_encodable") from error

    def _expected(self, tokens: int, sizes: Sequence[tuple[int, int]]) -> int:
        """Return how many of a sample's tokens the LLM is expected to run on, for images of these sizes."""
        if self.visual_share == 1:
            return tokens
        return tokens - int((1 - self.visual_share) * self.processor.visual_tokens(sizes))

    def filler(self) -> EncodedSample:
        """Return the sample of a filler batch: a blank image and a question mark."""
        parts = [{"type": "image", "index": 0}, {"type": "text", "text": "?"}]
        blank = Sample(
            key="",
            source="filler",
            task="vqa",
            messages=[{"role": "user", "content": parts}],
            images=[Image.new("RGB", (8, 8), "white")],
            references=["."],
            lines=[],
            sizes=[(8, 8)],
        )
        return replace(self, benchmark=None).encode(blank)

    def _prompt(self, sample: Sample) -> list[Message]:
        turns = sample.messages[:-1] if sample.messages[-1]["role"] == "assistant" else sample.messages
        if self.benchmark is None:
            return turns
        content = self.benchmark.prompt_for(sample.meta).apply(turns[-1]["content"], sample.meta)
        return [*turns[:-1], {**turns[-1], "content": content}]

    def collate(self, items: Sequence[EncodedSample], *, filler: bool = False) -> Batch:
        """Pad at least one encoded sample to a batch; a filler batch has no supervised token.

        Raises:
            DataError: Another batch for a loss has none.
        """
        tensors = self.processor.collate([item.encoded for item in items], pad_left=self.generation)
        batch = cast(Batch, {**tensors, **_fields(items), "filler": filler})
        if self.generation:
            samples = [item.sample for item in items]
            batch["references"] = [sample.references for sample in samples]
            batch["questions"] = [last_question(sample.messages) for sample in samples]
            batch["meta"] = [sample.meta for sample in samples]
            return batch
        if filler:
            batch["labels"].fill_(IGNORE_INDEX)
        self._find_positions(batch)
        return batch

    def collate_packed(self, rows: Sequence[Sequence[EncodedSample]]) -> Batch:
        """Put several documents into each row of a training batch; fields and errors as `collate` and those of rows."""
        tensors = self.processor.collate_packed([[item.encoded for item in row] for row in rows])
        fields = _fields([item for row in rows for item in row])
        batch = cast(Batch, {**tensors, **fields, "filler": False})
        batch["rows"] = [number for number, row in enumerate(rows) for _ in row]
        batch["documents_per_row"] = [len(row) for row in rows]
        self._find_positions(batch)
        if "segment_ids" in batch:
            batch["document_bounds"] = document_bounds(batch["segment_ids"])
            batch["longest_document"] = int(batch["document_bounds"].diff().max())
        return batch

    def _find_positions(self, batch: Batch) -> None:
        """Add the positions of a batch for a loss, and the number of those with one."""
        batch["supervised_positions"] = supervised_positions(batch["labels"])
        if (token := getattr(self.processor, "image_token_id", None)) is not None:
            batch["visual_positions"] = visual_positions(
                batch["input_ids"] == token,
                batch["num_tiles"],
                tokens_per_tile=self.processor.tokens_per_tile,
            )
        if batch["filler"]:
            return
        batch["num_supervised"] = len(batch["supervised_positions"])
        if not batch["num_supervised"]:
            raise DataError(
                f"a batch has no supervised token (keys {', '.join(batch['keys'])}); "
                f"the answers are empty or cut by max_text_length={self.max_text_length}"
            )


def _fields(items: Sequence[EncodedSample]) -> dict[str, Any]:
    """Return the lists of a batch, one entry for each sample."""
    samples = [item.sample for item in items]
    return {
        "keys": [sample.key for sample in samples],
        "sources": [sample.source for sample in samples],
        # Per image: only image 0 has lines.
        "lines": [[sample.lines, *([] for _ in sample.sizes[1:])] for sample in samples],
        "sizes": [sample.sizes for sample in samples],
        "truncated": [item.encoded.truncated for item in items],
        # Not in tensors, so that callbacks count without waiting for the device.
        "tokens": [len(item.encoded.input_ids) for item in items],
        "tiles": [item.encoded.num_tiles for item in items],
    }


def _in_order(messages: Sequence[Message], images: Sequence[Any]) -> list[Any]:
    """Return the images, or their sizes, in the order of their placeholders."""
    parts = (part for turn in messages for part in turn["content"])
    return [images[part["index"]] for part in parts if part["type"] == "image"]


def answered_messages(messages: list[Message], references: Sequence[str]) -> list[Message]:
    """Return all turns, and the first reference as answer of a conversation that ends with a question."""
    if messages[-1]["role"] == "assistant" or not references:
        return messages
    return [*messages, {"role": "assistant", "content": [{"type": "text", "text": references[0]}]}]
