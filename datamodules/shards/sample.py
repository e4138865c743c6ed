"""The sample schema, `{key}.json` with its images `{key}.0.png`, …, of docs/data.md, and its check (no torch here)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from alignvlm_pl.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

ROLES = ("system", "user", "assistant")
UNLABELLED = "nothing_to_learn"
"""Reason of a sample that has no supervised token."""
_LONGEST = 800  # characters of a message
_HALF = _LONGEST // 2
_FARTHEST_PX = 1_000_000_000
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # half a surrogate pair, which JSON may hold and no tokenizer encodes
Message = dict[str, Any]
Line = dict[str, Any]


class SampleError(DataError):
    """One sample is invalid, for a skip reason such as ``undecodable_image``; strict training stops, other skips it."""

    def __init__(self, message: str, reason: str = "invalid_sample") -> None:
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_HALF]} … {message[-_HALF:]}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One decoded document with its conversation.

    Attributes:
        key: Name of the sample in its shard, unique over all shards of a dataset.
        source: Where it comes from.
        task: Kind of task, for example ``vqa``.
        messages: Turns; content is a list of ``{"type": "image", "index"}`` and ``{"type": "text", "text"}``.
        images: RGB images, in the order of their index.
        references: All accepted answers of the last assistant turn; empty where none is known.
        lines: Text lines of image 0, ``{"text", "box": [x0, y0, x1, y1]}`` in pixels of the stored image.
        sizes: (width, height) in pixels of each stored image.
        meta: What a benchmark needs to score the prediction: options, split, document, …
    """

    key: str
    source: str
    task: str
    messages: list[Message]
    images: "list[Image]"
    references: list[str]
    lines: list[Line]
    sizes: list[tuple[int, int]]
    meta: dict[str, Any] = field(default_factory=dict)


def message_text(message: Mapping[str, Any]) -> str:
    """Join the text parts of one turn."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def last_question(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of the last user turn; empty where there is none."""
    return next((message_text(turn) for turn in reversed(messages) if turn["role"] == "user"), "")


def references(record: Mapping[str, Any]) -> list[str]:
    """Return the references of a record, else its last answer; blank texts are none."""
    last = record["messages"][-1]
    given = record.get("references") or ([message_text(last)] if last["role"] == "assistant" else [])
    return [text for text in given if text.strip()]


def check_record(record: Mapping[str, Any], *, num_images: int, where: str) -> None:
    """Check the JSON of one sample, and that its messages have a placeholder for each of the stored images.

    A violation of the sample schema is a SampleError that names the sample as `where`.
    """
    messages = messages_list(record, where)
    indices = [index for number, turn in enumerate(messages) for index in _check_turn(turn, number, where)]
    problem = ""
    if len(indices) != num_images:
        each = "each image needs exactly one placeholder"
        problem = f"{len(indices)} image placeholders in the messages but {num_images} images are stored; {each}"
    elif sorted(indices) != list(range(num_images)):
        problem = f"image placeholders have indices {indices}, expected each of 0..{num_images - 1} once"
    if problem:
        raise SampleError(f"{where}: {problem}", "placeholder_count")
    given, lines = record.get("references", []), record.get("lines", [])
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise SampleError(f"{where}: 'references' must be a list of strings, found {given!r:.120}")
    if any(map(_HALF_PAIR.search, given)):
        raise SampleError(f"{where}: half a surrogate pair in 'references': {given!a:.120}", "bad_json")
    if not isinstance(lines, list):
        raise SampleError(f"{where}: 'lines' must be a list, found {lines!r:.120}")
    if wrong := [line for line in lines if not _is_line(line)]:
        form = "{text, box: [x0, y0, x1, y1]} with x0 <= x1 and y0 <= y1 in pixels"
        raise SampleError(f"{where}: a line is {form}, found {wrong[0]!r:.120}", "lines")
    if not isinstance(record.get("meta", {}), Mapping):
        raise SampleError(f"{where}: 'meta' must be an object, found {record['meta']!r:.120}")


def messages_list(record: Mapping[str, Any], where: str) -> list[Any]:
    """Return the turns of a record, of any form; raise SampleError where there is none."""
    messages = record.get("messages")
    if isinstance(messages, list) and messages:
        return messages
    raise SampleError(f"{where}: 'messages' must be a list with at least one turn, found {messages!r:.120}")


def _check_turn(turn: object, number: int, where: str) -> list[int]:
    """Check one turn and return the indices of its images."""
    if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
        raise SampleError(f"{where}: turn {number} needs a role of {', '.join(ROLES)}, found {turn!r:.120}")
    content = turn.get("content")
    if not isinstance(content, list):
        raise SampleError(f"{where}: turn {number}: 'content' must be a list of parts, found {content!r:.120}")
    indices = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image" and isinstance(part.get("index"), int):
            indices.append(part["index"])
        elif not (kind == "text" and isinstance(part.get("text"), str)):
            raise SampleError(
                f"{where}: turn {number}: a part is {{type: text, text}} or {{type: image, index}}, found {part!r:.120}"
            )
        elif _HALF_PAIR.search(part["text"]):
            raise SampleError(f"{where}: turn {number}: half a surrogate pair in {part['text']!a:.120}", "bad_json")
    return indices


def _is_line(line: object) -> bool:
    """Whether a value has a text and a box of four finite numbers, the upper left corner before the lower right one."""
    box = line.get("box") if isinstance(line, Mapping) and isinstance(line.get("text"), str) else None
    if not isinstance(box, Sequence) or len(box) != 4 or not all(type(side) in (int, float) for side in box):
        return False
    left, top, right, bottom = box
    return all(abs(side) <= _FARTHEST_PX for side in box) and left <= right and top <= bottom  # False for nan
