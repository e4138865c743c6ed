"""What every maker of text draws from, and the loop that keeps its texts on one side of the split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from .lexicon import Lexicon, belongs, fingerprint, load_lexicon


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """What a maker may draw from: the words of one split."""

    split: str
    lexicon: Lexicon

    def pick(self, rng: Random, options: Sequence[str]) -> str:
        """Choose one of the options that the split may show; a word of the lexicon where none may."""
        allowed = _allowed(tuple(options), self.split)
        return rng.choice(allowed) if allowed else self.lexicon.word(rng, max_letters=6).title()


Maker = Callable[[Random, Words], str]


@cache
def _allowed(options: tuple[str, ...], split: str) -> tuple[str, ...]:
    return tuple(option for option in options if belongs(option, split))


@cache
def words_of(split: str) -> Words:
    """Return the view of one split that makers draw from."""
    return Words(split=split, lexicon=load_lexicon(split))


def draw(rng: Random, split: str, maker: Maker) -> str:
    """Call a maker until its string may stand on a page of `split` and has two letters or digits."""
    words = words_of(split)
    for _ in range(2000):
        value = " ".join(maker(rng, words).split())
        if len(fingerprint(value)) >= 2 and belongs(value, split):
            return value
    raise AssertionError(f"maker {maker.__name__} never gave a value of the {split} split")


def digits(rng: Random, count: int) -> str:
    """Return random digits."""
    return f"{rng.randrange(10**count):0{count}d}"


def any_of(makers: Mapping[Maker, float], rng: Random) -> Maker:
    """Choose a maker by its weight."""
    return rng.choices(list(makers), list(makers.values()))[0]
