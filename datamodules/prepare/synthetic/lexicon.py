"""Words for documents, and the one rule that keeps training and held-out documents apart.

A word is held out if the checksum of its lower-case letters says so: no list to keep, no seed, and the same result for
every source of words. Values (amounts, dates, codes, …) follow the same rule as whole strings, so a held-out page shows
no word and no value that any training page can show. Every text of a layout must pass `belongs`.
"""

import csv
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from importlib import import_module
from random import Random
from typing import Any
from zlib import crc32

from alignvlm_pl.errors import ConfigError, require_known

from .resources import package_files, package_folder

SPLITS = ("train", "heldout")
HELDOUT_PARTS = 8
"""One word or value in this many is held out."""
SHARED_RUNS = frozenset({"com", "net", "org", "www"})
"""Letters that both splits need inside e-mail addresses and links."""
MAX_WORD_LETTERS = 12

_ORIGINS = {"common": 60, "names": 16, "places": 14, "foreign": 10}
"""Parts of the lexicon, and how often a word is of each: English words; first and last names of several countries;
cities, streets, countries, airports; words of other languages in plain Latin letters."""
_FAKER_SOURCES = {
    "common": ("lorem.en_US", "job.en_US", "company.en_US", "color.en_US", "automotive.en_US"),
    "names": tuple(f"person.{code}" for code in "en_US en_GB de_DE fr_FR es_ES it_IT nl_NL en_IN id_ID".split()),
    "places": tuple(f"address.{code}" for code in "en_US en_GB de_DE fr_FR nl_NL pl_PL en_IN id_ID".split()),
    "foreign": tuple(f"lorem.{code}" for code in "fr_FR it_IT nl_NL pl_PL de_DE es_ES".split()),
}
_VEGA_SOURCES = {
    "common": "cars.json barley.json burtin.json us-employment.csv iris.json seattle-weather.csv".split(),
    "places": ("airports.csv", "la-riots.csv"),
}
_LETTERS = re.compile(r"[A-Za-z]+")
_RUNS = re.compile(r"[a-z]{3,}")


def alphanumerics(token: str) -> str:
    """Return the lower-case letters and digits of a token: what decides its split."""
    return "".join(character for character in token.lower() if character.isalnum())


@lru_cache(maxsize=1 << 16)
def _is_heldout(print_: str) -> bool:
    return crc32(print_.encode()) % HELDOUT_PARTS == 0


def prints(text: str) -> list[str]:
    """Return what decides the split of a text: its tokens (between blanks) of two or more letters and digits, and
    the runs of three or more letters within them.
    """
    tokens = [print_ for token in text.split() if len(print_ := alphanumerics(token)) >= 2]
    return [*tokens, *(run for run in _RUNS.findall(text.lower()) if run not in SHARED_RUNS)]


def belongs(text: str, split: str, *, usual: Collection[str] = ()) -> bool:
    """Say whether a page of `split` may show `text`.

    Each of its `prints` must be on the side of `split`, or among the `usual` ones, which both splits show. Single
    characters are free.
    """
    return all(print_ in usual or _is_heldout(print_) == (split == "heldout") for print_ in prints(text))


def check_split(split: str) -> None:
    """Raise a ConfigError for a split that does not exist."""
    require_known(split, SPLITS, f"split of a synthetic dataset: unknown {split!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lexicon:
    """Lower-case words of one split, by origin: ``common``, ``names``, ``places``, ``foreign``."""

    split: str
    words: Mapping[str, tuple[str, ...]]

    def word(self, rng: Random, *, origin: str | None = None, max_letters: int = MAX_WORD_LETTERS) -> str:
        """Draw one lower-case word, of any origin where None, of at most `max_letters`, which is at least 4."""
        words = self.words[origin or rng.choices(list(_ORIGINS), list(_ORIGINS.values()))[0]]
        while True:
            word = words[int(rng.random() * len(words))]
            # Words of two letters are kept for variety, but say little and make poor labels.
            if len(word) <= max_letters and (len(word) > 2 or rng.random() < 0.15):
                return word

    def pick(self, rng: Random, options: Sequence[str]) -> str:
        """Choose one of the options that the split may show; a word where none may."""
        allowed = _allowed(tuple(options), self.split)
        return rng.choice(allowed) if allowed else self.word(rng, max_letters=6).title()


@cache
def _allowed(options: tuple[str, ...], split: str) -> tuple[str, ...]:
    return tuple(option for option in options if belongs(option, split))


@cache
def load_lexicon(split: str) -> Lexicon:
    """Read words from Faker, wonderwords and vega_datasets; raises ConfigError where one is not installed."""
    check_split(split)
    return Lexicon(split=split, words={origin: _allowed(words, split) for origin, words in _all_words().items()})


def lexicon_digest() -> str:
    """Return a checksum of all words: other package versions give another one, and other documents."""
    text = "\n".join(f"{origin} {' '.join(words)}" for origin, words in sorted(_all_words().items()))
    return sha256(text.encode()).hexdigest()[:16]


@cache
def _all_words() -> dict[str, tuple[str, ...]]:
    package_folder("faker")
    texts = {
        origin: {text for module in modules for text in _faker_texts(module)}
        for origin, modules in _FAKER_SOURCES.items()
    }
    lists = {path.stem: path.read_text("utf-8").split() for path in package_files("wonderwords", "assets/*.txt")}
    profane = {word.lower() for word in lists.pop("profanitylist")}
    texts["common"].update(word for words in lists.values() for word in words)
    for origin, names in _VEGA_SOURCES.items():
        for row in (row for name in names for row in read_table(name)):
            texts[origin].update(row, (cell for cell in row.values() if isinstance(cell, str)))
    return {origin: _words(found, exclude=profane) for origin, found in texts.items()}


def _words(texts: Iterable[str], *, exclude: set[str]) -> tuple[str, ...]:
    """Cut texts into lower-case words of plain letters, sorted so that the order never varies."""
    found = {run.lower() for text in texts if text.isascii() for run in _LETTERS.findall(text)}
    return tuple(sorted(word for word in found if 2 <= len(word) <= MAX_WORD_LETTERS and word not in exclude))


def _faker_texts(module: str) -> Iterable[str]:
    """Yield the strings in the public tables of one Faker provider, format strings skipped."""
    provider: Any = import_module(f"faker.providers.{module}").Provider
    for name in dir(provider):
        table = getattr(provider, name)
        if name.startswith("_") or "format" in name or not isinstance(table, tuple | list | Mapping):
            continue
        for entry in table:
            yield from (str(part) for part in entry) if isinstance(entry, tuple | list) else (str(entry),)


@cache
def read_table(name: str) -> list[dict[str, Any]]:
    """Read a CSV or JSON table of vega_datasets as records; raises ConfigError where the file is missing."""
    path = package_folder("vega_datasets") / "_data" / name
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; install vega_datasets again") from error
    rows: list[dict[str, Any]] = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    return rows
