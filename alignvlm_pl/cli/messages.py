"""What jsonargparse says about a wrong configuration, as one line that names the nearest right key.

The parser's own complaints repeat the given value and list types; what a user needs is the key, the key that was
probably meant, or for a wrong value the reason.
"""

import difflib
import re
from collections.abc import Collection, Iterable

from ..errors import nearest

_KEY = re.compile(r"""Parser key "([\w.]+)":""")
_UNKNOWN_KEY = (
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.+-]+)'"),
    re.compile(r"does not accept option '(?P<key>[\w.+-]+)'"),
    re.compile(r"Option '(?P<key>[\w.+-]+)' is not accepted"),
    re.compile(r"[Uu]nrecognized arguments: --(?P<key>[\w.+-]+)"),
)
_UNKNOWN_CLASS = (
    re.compile(r"Expected a dot import path string: ([\w.]+)"),
    re.compile(r"Import path ([\w.]+)"),
    re.compile(r"Problem with given class_path '([\w.]+)'"),
    re.compile(r"[Uu]nable to import '?([\w.]+)'?"),
)
_REQUIRED = re.compile(r"arguments are required: ([\w., ]+)")
_NOISE = re.compile(r"Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value")


def explain(message: str, keys: Collection[str], classes: Collection[str]) -> str:
    """Shorten a complaint of the parser.

    Args:
        message: What jsonargparse said.
        keys: All known keys, dotted; those of a class are under `<key>.init_args`.
        classes: Names that a `class_path` may have.
    """
    found = _KEY.search(message)
    group = found.group(1) if found else ""
    for pattern in _UNKNOWN_KEY:
        if match := pattern.search(message):
            parts = match.groupdict()
            prefix = parts.get("group") or group
            key = parts["key"] if not prefix else f"{prefix}.{parts['key']}"
            return unknown_key(_below_init_args(key, keys), keys)
    for pattern in _UNKNOWN_CLASS:
        if match := pattern.search(message):
            name = match.group(1)
            return (
                f"{group}.class_path {name!r} is no known class; {nearest(name.rsplit('.', 1)[-1], classes)}"
            )
    if match := _REQUIRED.search(message):
        keys = [key.split(".", 1)[-1] for key in match.group(1).split(", ")]
        return f"missing: {', '.join(keys)}; give {' '.join(f'--{key} FILE' for key in keys)}"
    lines = [_KEY.sub(r"\1:", line).strip(" -") for line in message.splitlines() if not _NOISE.search(line)]
    kept = list(dict.fromkeys(line.replace('"', "'") for line in lines if line))
    return " ".join(line for line in kept if not any(line != other and line in other for other in kept))


def unknown_key(key: str, keys: Collection[str]) -> str:
    """Describe an unknown key by the nearest known one: in its group if it has a known one, else anywhere."""
    group, leaf = "", key
    while "." in leaf:
        head, rest = leaf.split(".", 1)
        nested = f"{group}.{head}" if group else head
        if not any(known.startswith(nested + ".") for known in keys):
            break
        group, leaf = nested, rest
    known = [k.removeprefix(group + ".") for k in keys if not group or k.startswith(group + ".")]
    near = _nearest_path(leaf, known) or _nearest_path(leaf, keys, full=True)
    if near is not None:
        prefix = f"{group}." if group and near in known else ""
        return f"unknown key {key!r}; did you mean {prefix + near!r}?"
    near = _closest(leaf, known, cutoff=0.0)
    return f"unknown key {key!r}; the nearest known one is {f'{group}.{near}' if group else near!r}"


def _below_init_args(key: str, keys: Collection[str]) -> str:
    """Options of a class may be given without `init_args`; name them with it."""
    group, _, leaf = key.partition(".")
    nested = f"{group}.init_args."
    if leaf and not key.startswith(nested) and any(known.startswith(nested) for known in keys):
        return nested + leaf
    return key


def _nearest_path(path: str, known: Iterable[str], *, full: bool = False) -> str | None:
    """The most similar of dotted names: by the whole, else by the first part, else by the last one."""
    names = sorted(known)
    leaf = path.rsplit(".", 1)[-1]
    if not full:
        if near := _closest(path, names):
            return near
        head, _, rest = path.partition(".")
        parent = _closest(head, {name.split(".", 1)[0] for name in names})
        if parent and rest:
            below = [name for name in names if name.startswith(parent + ".")]
            return _closest(f"{parent}.{rest}", below) or parent
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    # Elsewhere only what is all but equal: another group's key is seldom the one that was meant.
    near_leaf = _closest(leaf, by_leaf, cutoff=0.9 if full else 0.6)
    return by_leaf[near_leaf] if near_leaf else None


def _closest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None
