"""The parser's error messages on one line, and the nearest known key of an unknown one."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile
from textwrap import dedent

from .old_names import OPTIONS

_TYPES = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Not a valid subclass of",
    "Subclass types expect",
    "a class path (str)",
    "a dict ",
    "Given value",
)
"""Starts of lines in which jsonargparse lists the types that it tried. One that it words differently is shown."""
_CLASS = "Problem with given class_path"
_NO_CLASS = re.compile(r"(?:a dot import path string|Unexpected import path format): (\S+)")
_LISTED = 8
"""Largest number of keys that are listed where none is near the unknown one."""
_SHOWN = 60
"""Largest number of characters of a value that are shown."""
_USE = {"trainer.precision": "use bf16-mixed, or 32-true on a device without bfloat16"}
"""Setting of which Lightning's types hold more than can be used -> what can be."""
_REQUIRED = "the following arguments are required: "
_VALUE = "Given value: "
_SHORT = {"Parser key ": "", "a typing.Literal": "one of ", "a <class '": "", "'>": "", '"': ""}


def shorten(message: str, classes: Mapping[str, Collection[str]] | None = None) -> str:
    """Put a message of jsonargparse on one line, without the types that it tried.

    One of the whole command has `classes`, setting -> names of classes, of which one like a word of it is proposed.
    """
    text = _shorten(message, whole=bool(classes))
    key, classes = text.partition(": ")[0], classes or {}
    known = classes.get(key) or [name for names in classes.values() for name in names]
    if absent := _NO_CLASS.search(text):
        name = absent[1]
        near = _closest(name.rpartition(".")[2], known)
        cure = f"did you mean {near!r}?" if near else "give it as package.module.Class"
        return f"{key}: there is no class {name!r}; {cure}"
    words = (word.strip("'\":,").rpartition(".")[2] for word in text.partition(": ")[2].split())
    meant = (_closest(word, known, cutoff=0.8) for word in words if "did you mean" not in text)
    near = next((name for name in meant if name and name not in text), None)
    return f"{text}; did you mean {near!r}?" if near else text


def _shorten(message: str, *, whole: bool) -> str:
    lines = message.splitlines()
    if (at := next((number for number, line in enumerate(lines) if _CLASS in line), None)) is not None:
        # A value that names a class: what that class says stands below it, the rest are other types that were tried.
        indent = len(lines[at]) - len(lines[at].lstrip())
        inner = takewhile(lambda line: line[: indent + 1].isspace(), lines[at + 1 :])
        key = "".join(lines[: min(at, 1)])
        parts = _shorten(key, whole=False), lines[at].strip(" -"), shorten(dedent("\n".join(inner)))
        return " ".join(filter(None, parts))
    if message.startswith(_REQUIRED):
        names = message.removeprefix(_REQUIRED).split(", ")
        if not whole:  # of a class, not of the command
            return f"missing: {', '.join(names)}"
        keys = [name.split(".", 1)[-1] for name in names]
        return f"missing: {', '.join(keys)}; give {' '.join(f'--{key} FILE' for key in keys)}"
    lines = [line.strip().removeprefix("- ") for line in lines]
    text = " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(_TYPES)))
    if whole and text.endswith('":'):  # none of the types was of use
        text += " Expected a class, by its class_path"
    found = next((line.removeprefix(_VALUE) for line in lines if line.startswith(_VALUE)), "")
    if found and found not in text:
        shown = found if len(found) <= _SHOWN else f"{found[:_SHOWN]}..."
        text = f"{text} (found {shown})"
    for long, short in _SHORT.items():
        text = text.replace(long, short)
    first, *others = text.split(" Expected ")
    key = first.rstrip(":")
    if key in _USE:
        return f"{key}={found} is not supported; {_USE[key]}"
    return " Expected ".join([first, " or ".join(others)]) if others else text


def unknown_key(key: str, keys: Collection[str]) -> str:
    """Describe an unknown key: by what has become of it, else by the nearest known one, in its group if it has one."""
    if instead := OPTIONS.get(_last(key)):
        return f"{key} was removed: {instead}"
    keys = sorted(name for name in keys if _last(name) != "help")
    group = key.rpartition(".")[0]
    while group and not any(name.startswith(f"{group}.") for name in keys):
        group = group.rpartition(".")[0]
    prefix = f"{group}." if group else ""
    leaf, known = key.removeprefix(prefix), [name.removeprefix(prefix) for name in keys if name.startswith(prefix)]
    longer = [name for name in known if name.startswith(f"{leaf}_")]
    if group and longer:
        return f"unknown key {key!r}; there are {', '.join(prefix + name for name in longer)}"
    if near := _closest(leaf, known) or _nearest_last(leaf, known):
        return f"unknown key {key!r}; did you mean {prefix + near!r}?"
    # Elsewhere only what is all but equal: another group's key is seldom the one that was meant.
    if near := _nearest_last(leaf, keys, cutoff=0.9):
        return f"unknown key {key!r}; did you mean {near!r}?"
    heads = sorted({name.split(".", 1)[0] for name in known})
    if len(heads) <= _LISTED:
        return f"unknown key {key!r}; there are {', '.join(prefix + head for head in heads)}"
    return f"unknown key {key!r}; the nearest known one is {prefix + (_closest(leaf, known, cutoff=0.0) or '')!r}"


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _nearest_last(path: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The dotted name whose last part is most similar."""
    names = {_last(name): name for name in known}
    return names.get(_closest(_last(path), names, cutoff=cutoff) or "")


def _closest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)
