"""The letter of the option that a reply chooses, by rules alone.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/utils/matching_util.py`; `vlmevalkit-2025-02` = 282a0afc;
`official` = MMMU-Benchmark/MMMU bb0b95a9, `mmmu/utils/eval_utils.py`; `lmms-eval` = SEED-Bench in lmms-eval 75571cfe.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from .base import check_rule

NONE = "Z"
"""Stands for a reply that chooses nothing; never right."""

# The four refusals that the reference knows, anywhere in a reply, to the letter.
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_REPLY = "Failed to obtain answer via API"  # what the toolkit puts where a model did not answer
_SEPARATORS = str.maketrans(".()[],:;!*#{}", " " * 13)
_LAST_WORDS = 4
_SHORT_REPLY = 5  # words in which options are not quoted
_STATED = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)

Choices = Mapping[str, object]


def chosen_letter(prediction: str, choices: Choices, *, rule: str = "vlmevalkit") -> str:
    """Letter of the option that the reply chooses; `Z` where it chooses none.

    Where `official` draws a letter at random, this is `Z` too: a guess is no answer of the model.

    Raises:
        ConfigError: There is no such rule.
    """
    return _READERS[check_rule("multiple_choice", rule, RULES)](prediction, choices) or NONE


def _vlmevalkit(reply: str, choices: Choices) -> str | None:
    words = reply.translate(_SEPARATORS).split()
    letter = _lettered(reply, words, choices)
    if letter is not None and letter != NONE and words.index(letter) < len(words) - _LAST_WORDS:
        letter = None  # too far from the end to be the answer
    if letter is None:
        letter = _stated(reply, choices)
    if letter is None and len(reply) <= 2 * sum(len(str(text)) for text in choices.values()):
        letter = _quoted(reply, choices)
    return letter


def _vlmevalkit_2025_02(reply: str, choices: Choices) -> str | None:
    letter = _lettered(reply, reply.translate(_SEPARATORS).split(), choices)
    return _quoted(reply, choices) if letter is None else letter


def _stated(reply: str, choices: Choices) -> str | None:
    """The letter after the first `answer is`, where there is such an option: in `answer is dog` it is a D."""
    stated = None if _NO_REPLY in reply else _STATED.search(reply)
    return stated[1].upper() if stated and stated[1].upper() in choices else None


def _lettered(reply: str, words: Sequence[str], choices: Choices) -> str | None:
    """The only option letter among the words; `Z` for a refusal; None: undecided."""
    if _NO_REPLY in reply:
        return None
    if any(refusal in reply for refusal in _REFUSALS):
        return NONE
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1:
        return letters[0]
    return NONE if not letters and NONE in words else None


def _quoted(reply: str, choices: Choices) -> str | None:
    """The only option whose text stands in the reply."""
    reply = reply.lower()
    quoted = [letter for letter, text in choices.items() if str(text).lower() in reply]
    return quoted[0] if len(quoted) == 1 else None


def _official(reply: str, choices: Choices) -> str | None:
    """The option named last: in brackets, else as a word, else by its text in a longer reply."""
    for mark in ",.!?;:'":  # one after the other: of "B,." only the period goes
        reply = reply.strip(mark)
    reply = f" {reply} "
    spellings: list[Callable[[str], str]] = ["({})".format, " {} ".format]
    for spelling in spellings:
        places = {letter: reply.rfind(spelling(letter)) for letter in choices}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    if len(reply.split()) <= _SHORT_REPLY:
        return None
    places = {letter: reply.lower().rfind(str(text).lower()) for letter, text in choices.items()}
    return max(places, key=places.__getitem__) if max(places.values()) >= 0 else None


def _lmms_eval(reply: str, choices: Choices) -> str | None:
    first = reply.strip()[:1].upper()
    return first if first in choices else None


_READERS: dict[str, Callable[[str, Choices], str | None]] = {
    "vlmevalkit": _vlmevalkit,
    "vlmevalkit-2025-02": _vlmevalkit_2025_02,
    "official": _official,
    "lmms-eval": _lmms_eval,
}
RULES = tuple(_READERS)
