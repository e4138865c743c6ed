"""LLaVA's conversations -> turns in the sample schema."""

from collections.abc import Mapping
from typing import Any

from ...shards.sample import Message, SampleError, message_text

IMAGE_TOKEN = "<image>"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


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
    turns: list[Message] = []
    images = 0
    for number, turn in enumerate(conversations):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        text = turn.get("value") if isinstance(turn, Mapping) else None
        if speaker not in _ROLES or not isinstance(text, str):
            raise SampleError(
                f"{where}: turn {number} needs 'from' ({', '.join(_ROLES)}) and 'value' (a text), found {turn!r:.120}",
                "bad_conversation",
            )
        # In an answer the token is plain text.
        content = _parts(text, images) if speaker == "human" else [{"type": "text", "text": text}]
        images += sum(part["type"] == "image" for part in content)
        turns.append({"role": _ROLES[speaker], "content": content})
    if images != num_images:
        raise SampleError(f"{where}: {images} times {IMAGE_TOKEN} but {num_images} images", "placeholder_count")
    answers = [turn["content"][0]["text"] for turn in turns if turn["role"] == "assistant"]
    if not answers or not any(text.strip() for text in answers):
        raise SampleError(f"{where}: no turn of gpt with text", "empty_answer")
    return turns


def _parts(text: str, first: int) -> list[dict[str, Any]]:
    """Split a turn at its image tokens; the line break that parts a token from its text goes with it."""
    parts: list[dict[str, Any]] = []
    pieces = text.split(IMAGE_TOKEN)
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image", "index": first + number - 1})
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def check_answered(record: Mapping[str, Any], *, where: str) -> None:
    """Check that a record in the sample schema has a non-empty answer or reference.

    Records without a turn of the assistant pass: they are questions alone, as of a benchmark's test split.

    Raises:
        SampleError: All its answers are empty (``empty_answer``).
    """
    answers = [message_text(turn) for turn in record["messages"] if turn["role"] == "assistant"]
    if answers and not any(text.strip() for text in (*answers, *record.get("references", ()))):
        raise SampleError(f"{where}: all answers are empty", "empty_answer")
