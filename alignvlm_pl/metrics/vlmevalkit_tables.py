"""What VLMEvalKit's tables do to gold answers and predictions on their way to the score.

Reference: VLMEvalKit e8e78f05 and 282a0afc, `process_line` of `vlmeval/dataset/utils/vqa_eval.py`, and the
xlsx file that `vlmeval/smp/file.py` writes and pandas reads.
"""

import ast
import operator
import re
import warnings
from collections.abc import Callable, Sequence

MISSING = frozenset(
    "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null|".split(
        "|"
    )
)
"""Texts that pandas reads as a missing value."""
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?)\s*", re.ASCII)
_ARITHMETIC: dict[type[ast.AST], Callable[..., object]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def read_references(cell: str) -> tuple[str, ...]:
    """Read the ``answer`` column: a text that is a Python list holds the references, any other text is one.

    So ``[2010, 2011]`` are two accepted answers, while ``[Pink, Blue]``, which is no valid Python, is one. The
    original evaluates the text; here only literals and sums of numbers are. Elements become texts, where some of
    the original's metrics stop at anything else.
    """
    if "[" not in cell:
        return (cell,)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes such as \d
            body = ast.parse(cell.lstrip(" \t"), mode="eval").body
            if isinstance(body, ast.List):
                return tuple(str(_evaluate(element)) for element in body.elts)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError):
        pass
    return (cell,)


def _evaluate(node: ast.expr) -> object:
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(left, int | float) and isinstance(right, int | float):
            return _ARITHMETIC[type(node.op)](left, right)
    return ast.literal_eval(node)


def reload_predictions(predictions: Sequence[str]) -> list[str]:
    """Return the predictions as they are scored after a table file was written and read.

    Missing values come back as the text ``nan``; where all predictions are numbers, the column becomes one of
    numbers and their spelling is lost: ``007`` is scored as ``7``, and ``12.50`` as ``12.5``.
    """
    present = [text for text in predictions if text not in MISSING]
    if not present or not all(_NUMBER.fullmatch(text) for text in present):
        return ["nan" if text in MISSING else text for text in predictions]
    whole = len(present) == len(predictions) and all(text.strip().lstrip("+-").isdigit() for text in present)
    read: Callable[[str], object] = int if whole else float
    return ["nan" if text in MISSING else str(read(text)) for text in predictions]
