"""LLaVA's conversations -> turns in the sample schema."""

import re
from collections.abc import Mapping
from typing import Any

from ...shards.sample import Message, SampleError, message_text
from ...shards.sample_formats import convert_docdownstream, image_marks, require_images_only, split_marks

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def read_conversation(record: Mapping[str, Any], *, num_images: int, where: str, marked: bool = True) -> dict[str, Any]:
    """Convert a record of a list, as LLaVA, LLaMA-Factory, ms-swift or DocDownstream write it, to the sample schema.

    Args:
        record: It has ``messages`` (`convert_docdownstream`) or ``conversations`` (`llava_turns`).
        num_images: Number of its images.
        where: Name of the record in errors.
        marked: As of `convert_docdownstream`.

    Raises:
        SampleError: As of these functions.
    """
    if "messages" in record or "conversations" not in record:
        return convert_docdownstream(record, num_images=num_images, where=where, marked=marked)
    require_images_only(record, where=where)
    turns = llava_turns(record["conversations"], num_images=num_images, where=where)
    return convert_docdownstream({**record, "messages": turns}, num_images=num_images, where=where)


def llava_turns(conversations: Any, *, num_images: int, where: str) -> list[Message]:
    """Convert turns of ``{from, value}``; each ``<image>`` of the human's turns becomes an image part where it stands.

    Args:
        conversations: The turns.
        num_images: Number of images of the row.
        where: Name of the row in errors.

    Raises:
        SampleError: No turns, an unknown speaker, no text (``bad_conversation``), ``<image>`` is not there once for
            each image (``placeholder_count``), or nothing is answered (``empty_answer``).
    """
    if not isinstance(conversations, list) or not conversations:
        raise SampleError(f"{where}: expected a list of turns, found {conversations!r:.120}", "bad_conversation")
    for number, turn in enumerate(conversations):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        text = turn.get("value") if isinstance(turn, Mapping) else None
        if speaker not in _ROLES or not isinstance(text, str):
            raise SampleError(
                f"{where}: turn {number} needs 'from' ({', '.join(_ROLES)}) and 'value' (a text), found {turn!r:.120}",
                "bad_conversation",
            )
    asked = [turn["value"] for turn in conversations if turn["from"] == "human"]
    mark = image_marks(asked, num_images, where=where)
    # The line break that parts a placeholder from its text goes with it.
    mark = re.compile(rf"\n?(?:{mark.pattern})\n?") if asked else mark
    turns: list[Message] = []
    images = 0
    for turn in conversations:
        human = turn["from"] == "human"
        content = split_marks(turn["value"], mark, images) if human else [{"type": "text", "text": turn["value"]}]
        images += sum(part["type"] == "image" for part in content)
        turns.append({"role": _ROLES[turn["from"]], "content": content})
    answers = [turn["content"][0]["text"] for turn in turns if turn["role"] == "assistant"]
    if not answers or not any(text.strip() for text in answers):
        raise SampleError(f"{where}: no turn of gpt with text", "empty_answer")
    return turns


def check_answered(record: Mapping[str, Any], *, where: str) -> None:
    """Check that a record in the sample schema has a non-empty answer or reference.

    Records without a turn of the assistant pass: they are questions alone, as of a benchmark's test split.

    Raises:
        SampleError: All its answers are empty (``empty_answer``).
    """
    answers = [message_text(turn) for turn in record["messages"] if turn["role"] == "assistant"]
    if answers and not any(text.strip() for text in (*answers, *record.get("references", ()))):
        raise SampleError(f"{where}: all answers are empty", "empty_answer")
