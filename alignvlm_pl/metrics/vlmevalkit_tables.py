"""How VLMEvalKit's tables change references and predictions before they are scored.

Reference: VLMEvalKit e8e78f05 and 282a0afc, `process_line` of `vlmeval/dataset/utils/vqa_eval.py`, and the
xlsx file that `vlmeval/smp/file.py` writes and pandas reads.
"""

import ast
import operator
import re
import warnings
from collections.abc import Callable, Sequence

MISSING = frozenset(
    "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null|".split("|")
)
"""Texts that pandas parses as a missing value."""
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
    """Parse a cell of the ``answer`` column: the elements of a Python list, else the text as the only reference.

    ``[2010, 2011]`` gives two references, ``[Pink, Blue]``, which is not valid Python, one. The reference
    implementation evaluates the text; here only literals and arithmetic of numbers are evaluated. Elements are
    converted to texts.
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
    """Return the predictions after a round trip through a table file, as VLMEvalKit scores them.

    Missing values become the text ``nan``. If all predictions are numbers, the column is numeric and spelling is lost:
    ``007`` becomes ``7``, and ``12.50`` becomes ``12.5``.
    """
    present = [text for text in predictions if text not in MISSING]
    if not present or not all(_NUMBER.fullmatch(text) for text in present):
        return ["nan" if text in MISSING else text for text in predictions]
    integers = len(present) == len(predictions) and all(text.strip().lstrip("+-").isdigit() for text in present)
    read: Callable[[str], object] = int if integers else float
    return ["nan" if text in MISSING else str(read(text)) for text in predictions]
