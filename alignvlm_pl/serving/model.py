"""A trained model that answers prompts in batches, or gives P_vocab's own text of a page."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from ..errors import AlignVLMError, CheckpointError, ConfigError
from ..models.answering import RowLimits, RowStreamer, row_tokens
from ..models.loading import load_pretrained, reading_settings, require_complete, require_model_type, weights_folder
from ..models.modeling import AlignVLMForConditionalGeneration
from ..models.page_readout import read_lines
from ..models.processing import AlignVLMProcessor, EncodedConversation
from ..preprocessing.images.trim import scale_to_width, trim_page

HASH_DIGITS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A question about a page, an RGB image as `ServedModel.fit_page` returns it, and how long its answer may be."""

    page: Image.Image
    question: str
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedPrompt:
    """A prompt as the model takes it; the page itself is no longer needed."""

    encoded: EncodedConversation
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer to a prompt.

    `tokens` were generated, the one that ends it included; of P_vocab's own text they are its characters. `seconds` are
    the batch's divided by its prompts, so that those of all answers add up. `finish_reason` is `length` where the limit
    cut the answer.
    """

    text: str
    tokens: int
    seconds: float
    finish_reason: Literal["stop", "length"]


class ServedModel:
    """A model and its processor from a folder, and how pages are shown to it.

    CONTRACT: No method changes the object, so a single worker thread may call it, whichever thread loaded it.

    Args:
        source: An exported folder, or `box:NAME`.
        page_width: Pages are cut to their content and scaled to this width in px; 0 leaves them as they are, None
            takes the width of the model's folder.
        device: Where the model runs; None takes a GPU where there is one.

    Raises:
        CheckpointError: There is no such folder, or it holds no whole model of this project.
        ConfigError: No box has this name.
    """

    def __init__(self, source: str, *, page_width: int | None = None, device: str | None = None) -> None:
        folder = weights_folder(source)
        if not Path(folder).is_dir():
            raise CheckpointError(
                f"--model {source}: there is no such folder; give an exported folder, or box:receipts"
            )
        require_model_type(folder, "alignvlm")
        settings = reading_settings(folder)
        self.source = source
        self.hash = folder_hash(Path(folder))
        self.page_width: int = settings["page_width"] if page_width is None else page_width
        self.field_question: str = settings["question"]
        self.transcription_question: str = settings["transcribe"]
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, missing = load_pretrained(AlignVLMForConditionalGeneration, folder, what="AlignVLM")
        require_complete(missing, what="AlignVLM", source=folder)
        self.model: Any = model.to(chosen).eval()
        self.processor = load_processor(folder)

    @property
    def has_readout(self) -> bool:
        """Whether the connector's weights are probabilities of text tokens, which can be read as text."""
        return bool(getattr(self.model.connector, "reads_text", False))

    def require_readout(self) -> None:
        """Raise a ConfigError for a model without a readout."""
        if not self.has_readout:
            raise ConfigError(
                f"--model {self.source}: connector {self.model.config.connector['type']!r} has no P_vocab, whose text "
                "--prompt readout writes; use --prompt transcribe, or a model with 'align'"
            )

    def fit_page(self, page: Image.Image) -> Image.Image:
        """Return an RGB page as the model is shown pages: cut to its content and scaled, see `page_width`."""
        return scale_to_width(trim_page(page)[0], self.page_width) if self.page_width else page

    def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """Encode a prompt.

        Raises:
            DataError: The question has no encoding, or the page cannot be cut into tiles.
        """
        content = [{"type": "image"}, {"type": "text", "text": prompt.question}]
        encoded = self.processor.encode([{"role": "user", "content": content}], [prompt.page], generation=True)
        return PreparedPrompt(encoded=encoded, max_new_tokens=prompt.max_new_tokens)

    def answer(
        self, prompts: Sequence[PreparedPrompt], *, on_text: Callable[[int, str], None] | None = None
    ) -> list[Answer]:
        """Answer prompts, at least one, greedily and independently of each other, each up to its own limit.

        Pages that are equal are encoded once. `on_text` is called with the index of a prompt and the next text of its
        answer, as it is made.
        """
        started = time.perf_counter()
        batch = self.processor.collate([prompt.encoded for prompt in prompts], pad_left=True)
        del batch["labels"]
        limits, ends = [prompt.max_new_tokens for prompt in prompts], self._ends()
        streamer = on_text and RowStreamer(self._decode, limits=limits, ends=ends, on_text=on_text)
        with torch.inference_mode():
            ids = self.model.generate(
                **{name: values.to(self.model.device) for name, values in batch.items()},
                max_new_tokens=max(limits),
                do_sample=False,
                stopping_criteria=[RowLimits(limits)],
                streamer=streamer,
            )
        made = ids[:, batch["input_ids"].shape[1] :].tolist()
        seconds = (time.perf_counter() - started) / len(prompts)
        answers = []
        for row, limit in zip(made, limits, strict=True):
            tokens, ended = row_tokens(row, limit, ends)
            reason: Literal["stop", "length"] = "stop" if ended else "length"
            answers.append(
                Answer(text=self._decode(tokens).strip(), tokens=len(tokens), seconds=seconds, finish_reason=reason)
            )
        return answers

    def read_out(self, page: Image.Image) -> Answer:
        """Return P_vocab's own text of a page as `fit_page` returns it: a line for each row of visual tokens with text.

        The LLM does not run.

        Raises:
            ConfigError: The connector has no P_vocab, or the tokenizer too few single characters.
        """
        self.require_readout()
        started = time.perf_counter()
        lines = read_lines(self.model, self.processor, page)
        seconds = time.perf_counter() - started
        text = "\n".join(filter(None, lines))
        return Answer(text=text, tokens=sum(map(len, lines)), seconds=seconds, finish_reason="stop")

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.processor.decode(tokens, skip_special_tokens=True)
        return text

    def _ends(self) -> frozenset[int]:
        found = self.model.generation_config.eos_token_id
        ends = found if isinstance(found, (list, tuple)) else [found]
        return frozenset(token for token in ends if token is not None)


def load_processor(folder: str | Path) -> AlignVLMProcessor:
    """Load the processor of an exported folder; raise a CheckpointError where it has none."""
    try:
        processor: AlignVLMProcessor = AlignVLMProcessor.from_pretrained(folder)
    except AlignVLMError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:  # of transformers, for files that are not there
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"{folder} has no processor that can be loaded ({reason}); export the model again"
        ) from error
    return processor


def folder_hash(folder: Path) -> str:
    """Return the first digits of a sha256 over names and contents of the files of a folder, inner folders left out."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:HASH_DIGITS]
