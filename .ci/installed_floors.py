"""Check that the installed versions are the floors of setup.cfg: python installed_floors.py EXTRA[,EXTRA…].

Exit status 1 and a line for each floor that is not what was installed: no resolver can choose such a floor, because
another dependency asks for more.
"""

import configparser
import re
import sys
from importlib.metadata import version
from pathlib import Path


def floors(extras: list[str]) -> dict[str, str]:
    """Read the lowest version of each direct dependency that names one from setup.cfg."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(Path(__file__).resolve().parents[1] / "setup.cfg", encoding="utf-8")
    lines = parser["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += parser["options.extras_require"][extra].splitlines()
    found = (re.match(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)", line.strip()) for line in lines)
    return {match[1]: match[2] for match in found if match}


def same(floor: str, installed: str) -> bool:
    """Compare `5.17` with `5.17.0`, and `2.11` with `2.11.0+cpu`."""
    left, right = ([int(part) for part in re.findall(r"\d+", text.split("+")[0])] for text in (floor, installed))
    width = max(len(left), len(right))
    return left + [0] * (width - len(left)) == right + [0] * (width - len(right))


wrong = [
    f"setup.cfg: {name}>={floor}, but the lowest that installs beside the others is {version(name)}"
    for name, floor in floors(sys.argv[1].split(",")).items()
    if not same(floor, version(name))
]
sys.stdout.write("\n".join(wrong or ["every floor of setup.cfg is installed"]) + "\n")
raise SystemExit(bool(wrong))
