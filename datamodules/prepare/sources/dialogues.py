"""LLaVA's conversations -> turns in the sample schema."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ...shards.sample import Message, SampleError, message_text
from ...shards.sample_formats import convert_docdownstream

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def read_conversation(record: Mapping[str, Any], *, num_images: int, where: str, marked: bool = True) -> dict[str, Any]:
    """Convert a record, as LLaVA, LLaMA-Factory, ms-swift or DocDownstream write it, to the sample schema.

    It has ``messages`` (`convert_docdownstream`), or ``conversations`` with turns of ``{from, value}``, in which each
    ``<image>`` of the human becomes an image part where it stands.

    Raises:
        SampleError: No turns, an unknown speaker, no text (``bad_conversation``), ``<image>`` is not there once for
            each image (``placeholder_count``), nothing is answered (``empty_answer``), or as `convert_docdownstream`.
    """
    if "messages" in record or "conversations" not in record:
        return convert_docdownstream(record, num_images=num_images, where=where, marked=marked)
    given = record["conversations"]
    if not isinstance(given, list) or not given:
        raise SampleError(f"{where}: expected a list of turns, found {given!r:.120}", "bad_conversation")
    turns: list[Message] = []
    for number, turn in enumerate(given):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if speaker not in tuple(_ROLES) or not isinstance(text, str):
            raise SampleError(
                f"{where}: turn {number} needs 'from' ({', '.join(_ROLES)}) and 'value' (a text), found {turn!r:.120}",
                "bad_conversation",
            )
        # Elsewhere `<image>` is a word of the text.
        content = text if speaker == "human" else [{"type": "text", "text": text}]
        turns.append({"role": _ROLES[speaker], "content": content})
    normal = convert_docdownstream({**record, "messages": turns}, num_images=num_images, where=where)
    turns = normal["messages"]
    if not any(message_text(turn).strip() for turn in turns if turn["role"] == "assistant"):
        raise SampleError(f"{where}: no turn of gpt with text", "empty_answer")
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = _without_breaks(turn["content"])
    return normal


def _without_breaks(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Remove the line break between an image and the text before or after it."""
    for part, following in pairwise(content):
        if following["type"] == "image" and part["type"] == "text":
            part["text"] = part["text"].removesuffix("\n")
        elif part["type"] == "image" and following["type"] == "text":
            following["text"] = following["text"].removeprefix("\n")
    return [part for part in content if part.get("text") != ""]


def check_answered(record: Mapping[str, Any], *, where: str) -> None:
    """Raise SampleError (``empty_answer``) where all answers and references of a record are empty.

    Records without a turn of the assistant pass: they are questions alone, as of a benchmark's test split.
    """
    answers = [message_text(turn) for turn in record["messages"] if turn["role"] == "assistant"]
    if answers and not any(text.strip() for text in (*answers, *record.get("references", ()))):
        raise SampleError(f"{where}: all answers are empty", "empty_answer")
