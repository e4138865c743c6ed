"""Formats of tar samples -> the sample schema (no torch here); docs/data.md has an example of each format."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.text_files import decode_text, parse_json

from ..storage.file_kinds import IMAGE_ENDINGS
from .columns import BIGDOCS
from .sample import Message, SampleError, messages_list

IMAGE_PLACEHOLDER = "<|image|>"
IMAGE_TOKEN = "<image>"
"""Spelling of the placeholder in LLaVA's and ms-swift's files."""
CAPTION_PROMPT = "Describe the image briefly."
"""Asked about images with a caption, unless another prompt is set; the paper states none."""
RawSample = Mapping[str, Any]
# The record in the sample schema, the encoded images, and their file names.
NormalSample = tuple[dict[str, Any], list[bytes], list[str]]
Adapter = Callable[[RawSample], NormalSample]

# Far above any conversation; a larger one is not parsed, as it could fill the memory.
MAX_JSON_BYTES = 16 << 20

_NUMBERED = re.compile(rf"([0-9]{{1,9}})\.({'|'.join(IMAGE_ENDINGS)})")


def locate_sample(raw: RawSample) -> str:
    """Name a tar sample in errors: its key and its shard."""
    return f"sample '{raw['__key__']}' in {raw['__url__']}"


def read_json(raw: RawSample) -> dict[str, Any]:
    """Parse the `json` member of a tar sample as `parse_record`; raise DataError where there is none."""
    if "json" not in raw:
        raise DataError(
            f"{locate_sample(raw)} has no json member (found: {_members(raw)}); "
            "the shard is damaged or made for another DataModule"
        )
    return parse_record(raw["json"], where=locate_sample(raw))


def parse_record(data: bytes, *, where: str) -> dict[str, Any]:
    """Parse the JSON object of one sample; SampleError (``bad_json``): too large, nested too deep, or other text."""
    try:
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"it has {len(data)} bytes, expected at most {MAX_JSON_BYTES}")
        record = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{where}: its json does not parse ({error})", "bad_json") from error
    if not isinstance(record, dict):
        raise SampleError(f"{where}: its json is a {type(record).__name__}, expected an object", "bad_json")
    return record


def read_normal(raw: RawSample) -> NormalSample:
    """Read a sample that is in the sample schema already."""
    return _with_images(read_json(raw), raw)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionReader:
    """Read img2dataset members (`jpg`, `txt`, `json`) as one question and its caption, or the sample schema.

    `prompt` is the text of the user's turn after the image, which may be empty; `source` that of the sample.
    """

    prompt: str
    source: str = "cc12m"

    def __call__(self, raw: RawSample) -> NormalSample:
        """Read one pair; raise SampleError where it has no image or caption."""
        record = read_json(raw) if "json" in raw else {}
        if "messages" in record:
            return _with_images(record, raw)
        name = next(iter(_image_members(raw, numbered=False)), None)
        if name is None:
            raise SampleError(
                f"{locate_sample(raw)} has no image member ({', '.join(IMAGE_ENDINGS[:4])}, …; found: {_members(raw)})",
                "missing_image",
            )
        try:
            caption = decode_text(raw["txt"]) if "txt" in raw else record.get("caption")
        except UnicodeDecodeError as error:
            raise SampleError(f"{locate_sample(raw)}: its txt is not UTF-8 ({error})", "bad_text") from error
        if not isinstance(caption, str) or not caption.strip():
            raise SampleError(f"{locate_sample(raw)} has no caption in its txt or json member", "empty_caption")
        normal = {
            "id": f"{self.source}/{raw['__key__']}",
            "source": self.source,
            "task": "caption",
            "messages": conversation([(self.prompt, caption.strip())], num_images=1),
        }
        return normal, [raw[name]], [name]


def read_bigdocs(raw: RawSample) -> NormalSample:
    """Read the sample schema, or a BigDocs row stored as json beside its images; DataError: no known columns."""
    record = read_json(raw)
    if "messages" in record:
        return _with_images(record, raw)
    where = locate_sample(raw)
    columns = BIGDOCS.resolve(record, where=where, fields=("id", "queries", "answers"))
    asked = pairs(record[columns["queries"]], record[columns["answers"]], where=where)
    files = _image_members(raw)
    normal = {
        "id": str(record[columns["id"]]),
        "source": str(record.get("dataset_name") or record.get("source") or "bigdocs"),
        "task": str(record.get("task_name") or record.get("task") or "document"),
        "messages": conversation(asked, num_images=len(files)),
    }
    return normal, [raw[file] for file in files], files


def read_docdownstream(raw: RawSample) -> NormalSample:
    """Read the sample schema, or a DocDownstream line stored as json beside its images."""
    record = read_json(raw)
    if is_converted(record.get("messages")):
        return _with_images(record, raw)
    files = _image_members(raw)
    normal = convert_docdownstream(record, num_images=len(files), where=locate_sample(raw))
    return normal, [raw[file] for file in files], files


FORMATS: dict[str, Adapter] = {
    "normal": read_normal,
    "docdownstream": read_docdownstream,
    "bigdocs": read_bigdocs,
    "captions": CaptionReader(prompt=""),
}
"""Name of a format, as `--format` takes it -> its reader."""


def image_marks(texts: Sequence[str], num_images: int, *, where: str, text_only: bool = False) -> re.Pattern[str]:
    """Return a pattern of the spellings that stand for images in a record; another spelling is plain text.

    Those whose number is that of the images do: ``<|image|>``, else ``<image>``, else both together; where none is, a
    SampleError (``placeholder_count``).

    Args:
        texts: The texts of its turns but answers, in which both spellings are plain text.
        num_images: Number of its images that no part of its turns names.
        where: Name of the record in errors.
        text_only: The record is known to be without images, so that ``<image>`` is a word of its text.
    """
    counts = {mark: sum(text.count(mark) for text in texts) for mark in (IMAGE_PLACEHOLDER, IMAGE_TOKEN)}
    there = [mark for mark, count in counts.items() if count and not (text_only and mark == IMAGE_TOKEN)]
    for marks in (*([mark] for mark in there), there):
        if sum(counts[mark] for mark in marks) == num_images:
            return re.compile("|".join(map(re.escape, marks)) or "(?!)")
    listing = " and ".join(f"{counts[mark]} times {mark}" for mark in there) or "none"
    total = sum(counts[mark] for mark in there)
    found = f"{total} image placeholders in the messages but {num_images} images ({listing})"
    raise SampleError(f"{where}: {found}; each image needs exactly one placeholder", "placeholder_count")


def names_images(record: Mapping[str, Any]) -> bool:
    """Return whether a record has a field of images, if an empty one or null."""
    return "image" in record or "images" in record


def convert_docdownstream(
    record: Mapping[str, Any], *, num_images: int, where: str, marked: bool = True
) -> dict[str, Any]:
    """Turn one DocDownstream record into the sample schema; its placeholders become image parts in order.

    What is no such record, has not one placeholder for each image, has video or audio, or a ``system`` that differs
    from the turn of the system is a SampleError.

    Args:
        record: ``messages`` with plain strings holding ``<|image|>`` or ``<image>``, ``dataset_name``, ``task_name``,
            and optionally ``system``, ``id``, ``references`` and ``lines``. Of a turn whose content is a list of parts,
            image parts without an index get the next one.
        num_images: Number of its images.
        where: Name of the record in errors.
        marked: False where no record of its file with images uses ``<image>``: it is then a word in a record that has
            no field of images.
    """
    messages = messages_list(record, where)
    for turn in messages:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str | list):
            raise SampleError(f"{where}: a turn is {{role, content: text}}, found {turn!r:.120}")
    require_images_only(record, where=where)
    messages = _with_system(record, messages, where)
    asked = [turn["content"] for turn in messages if _is_plain(turn) and turn.get("role") != "assistant"]
    text_only = not num_images and not marked and not names_images(record)
    if (parts := len(image_parts(messages))) > num_images:
        raise SampleError(
            f"{where}: {parts} image parts in the messages but {num_images} images; name their files in 'images'",
            "placeholder_count",
        )
    mark = image_marks(asked, num_images - parts, where=where, text_only=text_only)
    turns: list[Message] = []
    index = 0
    for turn in messages:
        content: str | list[Any] = turn["content"]
        if isinstance(content, list):
            content = _number_parts(content, index)
        elif turn.get("role") == "assistant":
            content = [{"type": "text", "text": content}] if content else []
        else:
            content = split_marks(content, mark, index)
        turns.append({"role": turn.get("role"), "content": content})
        index += len(image_parts(turns[-1:]))
    normal = {"source": record.get("dataset_name"), "task": record.get("task_name"), "messages": turns}
    normal |= {name: record[name] for name in ("id", "license", "references", "lines", "meta") if name in record}
    return {name: value for name, value in normal.items() if value is not None}


def require_images_only(record: Mapping[str, Any], *, where: str) -> None:
    """Raise SampleError where a record has video or audio, or a mark of an empty field of them (``unread_media``).

    In an answer the mark is plain text.
    """
    turns = [turn for name in ("messages", "conversations") for turn in as_list(record.get(name))]
    turns = [turn for turn in turns if isinstance(turn, Mapping)]
    for name in sorted(record.keys() & {"video", "videos", "audio", "audios"}):
        asked = str([turn for turn in turns if not {"assistant", "gpt"} & {turn.get("role"), turn.get("from")}])
        if record[name] or f"<{name.rstrip('s')}>" in asked:
            raise SampleError(
                f"{where}: {name!r} is {record[name]!r:.120}: video and audio are not read", "unread_media"
            )


def _with_system(record: Mapping[str, Any], messages: list[Any], where: str) -> list[Any]:
    """Return the turns of a record with its ``system`` (LLaMA-Factory, ms-swift) as the first one."""
    system = record.get("system")
    if system in (None, ""):
        return messages
    if not isinstance(system, str):
        raise SampleError(f"{where}: 'system' must be a text, found {system!r:.120}", "bad_row")
    parts = [{"type": "text", "text": system}]
    there = [turn["content"] for turn in messages if turn.get("role") == "system"]
    if there not in ([], [system], [parts]):
        raise SampleError(
            f"{where}: 'system' and a turn of the system differ: {system!r:.60}, {there!r:.120}", "bad_row"
        )
    return messages if there else [{"role": "system", "content": parts}, *messages]


def split_marks(text: str, mark: re.Pattern[str], first: int) -> list[dict[str, Any]]:
    """Split the text of a turn at its image placeholders; the first of them gets the index `first`."""
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(mark.split(text)):
        if number:
            content.append({"type": "image", "index": first + number - 1})
        if piece:
            content.append({"type": "text", "text": piece})
    return content


def image_parts(messages: Any) -> list[Mapping[str, Any]]:
    """Return the image parts of turns, which may be of any form; turns of plain text have none."""
    turns = messages if isinstance(messages, list) else []
    contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if _is_image(part)]


def is_converted(messages: Any) -> bool:
    """Whether turns are in the sample schema: none is plain text, and image parts have an index."""
    turns = messages if isinstance(messages, list) else []
    return not any(map(_is_plain, turns)) and all("index" in part for part in image_parts(turns))


def _number_parts(content: list[Any], first: int) -> list[Any]:
    """Give the image parts of a turn that have no index the next one; what they name besides is dropped."""
    numbered = []
    for part in content:
        unnumbered = _is_image(part) and "index" not in part
        numbered.append({"type": "image", "index": first} if unnumbered else part)
        first += _is_image(part)
    return numbered


def _is_image(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def pairs(queries: Any, answers: Any, *, where: str) -> list[tuple[str, str]]:
    """Pair the queries of a BigDocs row with its answers; each is a text or a list of texts.

    Other values are a SampleError (``bad_row``), as other numbers of them (``query_count``).
    """
    asked, answered = as_list(queries), as_list(answers)
    if not asked or len(asked) != len(answered):
        raise SampleError(f"{where}: {len(asked)} queries but {len(answered)} annotations", "query_count")
    if wrong := [text for text in asked + answered if not isinstance(text, str)]:
        raise SampleError(f"{where}: queries and annotations must be texts, found {wrong[0]!r:.120}", "bad_row")
    return list(zip(asked, answered, strict=True))


def conversation(pairs: list[tuple[str, str]], *, num_images: int) -> list[Message]:
    """Build the turns of question and answer pairs; all images come before the first question."""
    turns: list[Message] = []
    for number, (question, answer) in enumerate(pairs):
        images = [{"type": "image", "index": index} for index in range(num_images if number == 0 else 0)]
        text = [{"type": "text", "text": question}] if question else []
        turns.append({"role": "user", "content": [*images, *text]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def _with_images(record: dict[str, Any], raw: RawSample) -> NormalSample:
    """Return a record in the sample schema with its images; raise DataError where one is not in the tar."""
    named = record.get("images")
    try:
        files = [image["file"].lower() for image in named] if isinstance(named, list) else _image_members(raw)
    except (TypeError, KeyError, AttributeError) as error:
        raise SampleError(
            f"{locate_sample(raw)}: 'images' must be a list of {{file, w, h}}, found {named!r:.120}"
        ) from error
    # An untrusted json may name `__key__` as a file, whose text would be opened as a path.
    missing = [file for file in files if not isinstance(raw.get(file), bytes)]
    if missing:
        raise DataError(
            f"{locate_sample(raw)} is partial: its json names {len(files)} images but {', '.join(missing)} is not "
            "in the shard; copy the shard again or rebuild the dataset"
        )
    return record, [raw[file] for file in files], files


def _image_members(raw: RawSample, *, numbered: bool = True) -> list[str]:
    """Names of the image members: numbered ones in the order of their number, else a single one.

    Two that are the same image, ``0.jpg`` and ``0.png``, ``jpg`` and ``png``, are a SampleError (``repeated_member``).
    """
    found = sorted((int(match[1]), name) for name in raw if numbered and (match := _NUMBERED.fullmatch(name)))
    found = found or [(0, name) for name in IMAGE_ENDINGS if name in raw]
    for (number, name), (following, other) in pairwise(found):
        if number == following:
            raise SampleError(
                f"{locate_sample(raw)}: {name} and {other} are both image {number}: keep one", "repeated_member"
            )
    return [name for _, name in found]


def _members(raw: RawSample) -> str:
    """List the members of a tar sample, and say so where dots in their names have put several images under one key."""
    names = sorted(name for name in raw if not name.startswith("__"))
    dotted = [name for name in names if "." in name]
    images = [name for name in dotted if name.endswith(IMAGE_ENDINGS)]
    numbered = {name.partition(".")[0] for name in dotted} == {str(number) for number in range(len(images))}
    cut = f"; names are cut at their first dot: {len(images)} images share the key {raw['__key__']!r}"
    cut = cut if images and not (numbered and len(dotted) == len(images)) else ""
    return (", ".join(names) or "nothing") + cut


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, None as an empty list, and another value as a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_plain(turn: object) -> bool:
    return isinstance(turn, Mapping) and isinstance(turn.get("content"), str)
