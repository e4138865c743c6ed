"""Normalisation of short texts for VQA, TextVQA and POPE.

References: VLMEvalKit e8e78f05 and 282a0afc, `vlmeval/smp/misc.py` (`process_punctuation`) and
`vlmeval/dataset/utils/vqa_eval.py` (`process_answer`); MMF b0ffc7fb, `mmf/utils/m4c_evaluators.py`.
"""

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD_AWAY_FROM_DIGITS = re.compile(r"(?<!\d)\.(?!\d)")
_PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the reference implementations pass re.UNICODE as the count

_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = frozenset({"a", "an", "the"})

# Each word is also matched with any one of its apostrophes missing. The table of the reference implementations is
# incomplete: it has neither "we're" nor "she'll".
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


_CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word for word in _CONTRACTED for index, mark in enumerate(word) if mark == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # reversed in the original table


def clean_words(text: str, *, periods_after_digits: bool = True) -> str:
    """Normalise punctuation, case, number words, articles and contractions.

    With `periods_after_digits`, `5.` keeps its period, as in VLMEvalKit since May 2025.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = without_punctuation(text, periods_after_digits=periods_after_digits)
    words = [_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def clean_words_m4c(text: str) -> str:
    """Normalise as M4C's and EvalAI's processors do: commas and question marks are removed first, `'s` is a word."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return clean_words(text.strip(), periods_after_digits=False)


def without_punctuation(text: str, *, periods_after_digits: bool = True) -> str:
    """Remove punctuation, or replace it by spaces where it joins words.

    A mark is removed everywhere if it is next to a space anywhere in the text, or if any comma is between digits; else
    it is replaced by a space.
    """
    numeric = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _MARKS:
        deleted = numeric or mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if deleted else " ")
    period = _PERIOD_AWAY_FROM_DIGITS if periods_after_digits else _PERIOD_BEFORE_NO_DIGIT
    return period.sub("", cleaned, count=_MOST_PERIODS)
