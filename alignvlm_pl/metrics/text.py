"""Normalisations of texts that several metrics share."""


def collapse(text: str) -> str:
    """Strip white space, and collapse inner white space to single spaces."""
    return " ".join(text.split())


def without_newlines(text: str) -> str:
    """Remove line breaks and outer white space, as DocOwl1.5 (mPLUG-DocOwl f91a7685) does for all texts."""
    return text.strip().replace("\n", "")


def without_final_period(text: str) -> str:
    """Remove one final period, as DocOwl1.5 does for references, but not for predictions."""
    return text.removesuffix(".")
