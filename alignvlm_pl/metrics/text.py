"""Clean-up of answers that several metrics share."""


def collapse(text: str) -> str:
    """Remove outer white space, and make single spaces of inner white space."""
    return " ".join(text.split())


def without_newlines(text: str) -> str:
    """Delete line ends and outer white space: what DocOwl1.5 (mPLUG-DocOwl f91a7685) does to every answer."""
    return text.strip().replace("\n", "")


def without_final_period(text: str) -> str:
    """Delete one period at the end: what DocOwl1.5 does to gold answers, but not to predictions."""
    return text.removesuffix(".")
