"""The word check of `make check`: what it finds, what it leaves alone."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "words"

LIST = """
# a comment
foo bar -> baz
\\b_peek\\b -> a verb @ *.py
"""


@pytest.fixture
def check(tmp_path):
    def run(name, text, rules=LIST):
        (tmp_path / name).write_text(text, "utf-8")
        (tmp_path / "list.txt").write_text(rules, "utf-8")
        command = [sys.executable, str(SCRIPT), "--list", "list.txt", name]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_a_phrase_of_the_list_fails_with_its_place_and_what_to_write(check):
    done = check("page.md", "clean\nthe Foo bar of it\n")
    assert (done.returncode, done.stdout) == (1, 'page.md:2: "Foo bar": write "baz"\n')


@pytest.mark.parametrize(
    "text", ["a clean page\n", "foobar, foo bars\n", "<!-- words: off -->\nfoo bar\n<!-- words: on -->\n"]
)
def test_a_clean_page_passes(check, text):
    done = check("page.md", text)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_phrase_is_found_across_a_line_break_of_comments(check):
    done = check("code.py", "x = 1\n# some foo\n# bar here\n")
    assert done.stdout == 'code.py:2: "foo # bar": write "baz"\n'


def test_text_behind_an_exempt_part_keeps_its_line_number(check):
    done = check("page.md", "words: off\nfoo bar\nwords: on\nfoo bar\n")
    assert done.stdout.startswith("page.md:4:")


def test_a_rule_with_globs_holds_for_these_files_alone(check):
    assert check("code.py", "def _peek(): ...\n").returncode == 1
    assert check("page.md", "def _peek(): ...\n").returncode == 0


def test_a_line_that_is_no_rule_is_refused_with_its_number(check):
    done = check("page.md", "", rules="foo -> bar\nfoo bar\n")
    assert done.returncode == 1
    assert "list.txt:2: expected 'REGEX -> INSTEAD'" in done.stderr
