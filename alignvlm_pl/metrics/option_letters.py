"""The option letter that a reply chooses, found by rules.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/utils/matching_util.py`; `vlmevalkit-2025-02` = 282a0afc;
`official` = MMMU-Benchmark/MMMU bb0b95a9, `mmmu/utils/eval_utils.py`; `lmms-eval` = SEED-Bench in lmms-eval 75571cfe.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from .base import check_rule

NONE = "Z"
"""Letter of a reply that chooses no option; never correct."""

# The refusals of the reference implementation, matched anywhere in a reply.
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_REPLY = "Failed to obtain answer via API"  # VLMEvalKit's placeholder for a missing reply
_SEPARATORS = str.maketrans(".()[],:;!*#{}", " " * 13)
_LAST_WORDS = 4
_SHORT_REPLY = 5  # in replies of so few words option texts are not searched
_STATED = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)

Choices = Mapping[str, object]


def chosen_letter(prediction: str, choices: Choices, *, rule: str = "vlmevalkit") -> str:
    """Return the letter of the option that the prediction chooses; `Z` if it chooses none.

    `official` draws a random letter in that case; here it is `Z` too.
    """
    return _READERS[check_rule("multiple_choice", rule, RULES)](prediction, choices) or NONE


def _vlmevalkit(reply: str, choices: Choices) -> str | None:
    words = reply.translate(_SEPARATORS).split()
    letter = _lettered(reply, words, choices)
    if letter is not None and letter != NONE and words.index(letter) < len(words) - _LAST_WORDS:
        letter = None  # too far from the end
    if letter is None:
        letter = _stated(reply, choices)
    if letter is None and len(reply) <= 2 * sum(len(str(text)) for text in choices.values()):
        letter = _quoted(reply, choices)
    return letter


def _vlmevalkit_2025_02(reply: str, choices: Choices) -> str | None:
    letter = _lettered(reply, reply.translate(_SEPARATORS).split(), choices)
    return _quoted(reply, choices) if letter is None else letter


def _stated(reply: str, choices: Choices) -> str | None:
    """Return the letter after the first `answer is`, if it is an option; `answer is dog` gives D."""
    stated = None if _NO_REPLY in reply else _STATED.search(reply)
    return stated[1].upper() if stated and stated[1].upper() in choices else None


def _lettered(reply: str, words: Sequence[str], choices: Choices) -> str | None:
    """Return the only option letter among the words; `Z` for a refusal; None if undecided."""
    if _NO_REPLY in reply:
        return None
    if any(refusal in reply for refusal in _REFUSALS):
        return NONE
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1:
        return letters[0]
    return NONE if not letters and NONE in words else None


def _quoted(reply: str, choices: Choices) -> str | None:
    reply = reply.lower()
    quoted = [letter for letter, text in choices.items() if str(text).lower() in reply]
    return quoted[0] if len(quoted) == 1 else None


def _official(reply: str, choices: Choices) -> str | None:
    """Return the option named last: in brackets, else as a word, else by its text in a longer reply."""
    for mark in ",.!?;:'":  # one after the other: of "B,." only the period is removed
        reply = reply.strip(mark)
    reply = f" {reply} "
    spellings: list[Callable[[str], str]] = ["({})".format, " {} ".format]
    for spelling in spellings:
        positions = {letter: reply.rfind(spelling(letter)) for letter in choices}
        if max(positions.values()) >= 0:
            return max(positions, key=positions.__getitem__)
    if len(reply.split()) <= _SHORT_REPLY:
        return None
    positions = {letter: reply.lower().rfind(str(text).lower()) for letter, text in choices.items()}
    return max(positions, key=positions.__getitem__) if max(positions.values()) >= 0 else None


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
