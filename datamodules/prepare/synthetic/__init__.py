"""Generator of small documents with questions, text lines and boxes (no torch here).

`generate_document` renders one; `write_split` writes a dataset; `command.main` is `prepare synthetic`.
"""

from .generate import KINDS, PAGE_KINDS, Document, generate_document
from .sheet import Question
from .write import DOCUMENT_KINDS, write_split

__all__ = ["DOCUMENT_KINDS", "KINDS", "PAGE_KINDS", "Document", "Question", "generate_document", "write_split"]
