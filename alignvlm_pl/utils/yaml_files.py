"""YAML files of settings, read with one-line errors."""

from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError


def load_yaml(path: Path, *, option: str = "") -> dict[str, Any]:
    """Return the content of a YAML file; a ConfigError, after the `option`, if it is no mapping or has a key twice."""
    if not path.is_file():
        raise ConfigError(f"{option}{path}: there is no such file")
    try:
        text = path.read_text("utf-8")
        refuse_repeated_keys(text, source=f"{path}: ")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        raise ConfigError(f"{path} is empty: expected settings")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected settings, found {content!r}")
    return content


def refuse_repeated_keys(text: str, *, source: str = "") -> None:
    """Raise a ConfigError for YAML with a key twice in one mapping, of which PyYAML takes the last silently."""
    nodes, seen = [yaml.compose(text, yaml.SafeLoader)], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines:
                    raise ConfigError(
                        f"{source}key {name!r} is there twice, in lines {lines[name]} and {line}; keep one"
                    )
                lines[name] = line
                nodes.append(value)
