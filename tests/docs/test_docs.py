"""What README and docs say is there is there: links, files, commands, the tree, the messages of errors.md."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from alignvlm_pl.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
PACKAGES = ("alignvlm_pl", "callbacks", "datamodules")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def _prose(page: Path) -> str:
    return FENCE.sub("", page.read_text("utf-8"))


def _blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text("utf-8")) if language in languages]


def _commands(page: Path) -> list[list[str]]:
    """Words of every command line of a page, continuation lines joined and comments dropped."""
    lines = [line for block in _blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in re.split(r"&&", line)]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in _anchors(file), f"{target}: no such heading"


@pages
def test_named_files_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    named = re.findall(r"(?<![\w/.])((?:configs|alignvlm_pl|datamodules|callbacks|tests|perf|docs)/[\w./-]*\w/?)", text)
    # `perf/tokens_per_s` is a tag of TensorBoard; pictures are links and tested as such.
    tags = {name for name in named if name.startswith("perf/") and not name.endswith(".py")}
    missing = {name for name in named if not (ROOT / name).exists() and not name.endswith(".png")}
    assert missing - tags == set()


@pages
def test_commands_exist(page: Path) -> None:
    from datamodules.prepare import _KINDS

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for words in _commands(page):
        if words[0] == "make":
            assert words[1] in targets, words
        if words[:2] == ["python", "cli.py"] or words[0] == "alignvlm":
            arguments = words[2:] if words[0] == "python" else words[1:]
            assert arguments[0] in COMMANDS, words
            if arguments[0] == "prepare" and arguments[1] != "--help":
                assert arguments[1] in _KINDS, words


@pages
def test_yaml_and_python_blocks_parse(page: Path) -> None:
    for block in _blocks(page, "yaml"):
        yaml.safe_load(block)
    for block in _blocks(page, "python"):
        ast.parse(re.sub(r"^   ", "", block, flags=re.MULTILINE) if block.startswith("   ") else block)


def test_every_page_is_on_the_map() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / t.split("#")[0]).resolve() for t in re.findall(r"\]\(([^)\s]+)\)", _prose(index))}
    assert {page for page in PAGES if page.parent.is_relative_to(index.parent)} - linked <= {index}


def test_tree_in_readme_is_the_tree() -> None:
    tree = next(block for block in _blocks(ROOT / "README.md", "") if "alignvlm_pl/" in block)
    names, parent = set(), ""
    for line in tree.splitlines():
        for name in re.split(" {2,}", line.strip())[0].split(", "):
            parent = parent if line.startswith(" ") else name
            names.add(name if name == parent else parent + name)
    assert {name for name in names if not (ROOT / name).exists()} == set()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    folders = {f"{name.split('/')[0]}/" for name in listed.stdout.splitlines() if "/" in name}
    assert {folder for folder in folders if not folder.startswith(".")} - names == set()
    rooms = {
        f"{path.parent.name}/{path.name}/"
        for name in ("alignvlm_pl", "datamodules")
        for path in (ROOT / name).glob("[a-z]*/")
    }
    assert rooms - names == set()
    assert len(tree.splitlines()) <= 25


def test_the_walk_of_a_sample_names_at_most_20_files_once() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text("utf-8")
    walk = page.partition("## One sample, from the tar file to the metric")[2].partition("\n## ")[0]
    files = re.findall(r"`([\w/]+\.py)`", walk)
    assert 10 < len(files) <= 20
    assert len(set(files)) == len(files)
    assert [name for name in files if not (ROOT / name).is_file()] == []


def _messages() -> list[str]:
    """Every string of the packages, values replaced by an ellipsis, white space collapsed."""
    found = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_error_messages_are_the_programs() -> None:
    foreign = {"Problem with given class_path"}  # jsonargparse's
    rows = re.findall(r"^\| ([^|]+?) \|", _prose(ROOT / "docs" / "errors.md").replace(r"\|", "¦"), flags=re.MULTILINE)
    plain = (row.replace("`", "").replace("stage.json", "…") for row in rows)  # a constant, filled in
    wanted = {part.strip(" .") for row in plain for part in re.split("…|,|;|=", row)}
    program = "\n".join(_messages())
    missing = {part for part in wanted if len(part) > 9 and part not in program} - foreign
    assert not missing, sorted(missing)


@pytest.mark.slow
def test_python_of_the_quickstart_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from alignvlm_pl.models.build import build_model, build_processor
    from alignvlm_pl.models.tiny import tiny_spec

    spec = tiny_spec(tmp_path / "tokenizer")
    processor = build_processor(spec)
    build_model(spec, processor).save_pretrained(tmp_path / "hf")
    processor.save_pretrained(tmp_path / "hf")
    Image.new("RGB", (60, 40), "white").save(tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    (code,) = _blocks(ROOT / "docs" / "quickstart.md", "python")
    exec(compile(code.replace("runs/demo/3-instruct/hf", "hf"), "quickstart.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[")
