"""Reading text straight from P_vocab: the loss of the read warm start, and the decoder back to text.

ALIGN's weights are a distribution over the LLM's own tokens, so a row of visual tokens can be read like the output of
a text-line recogniser. A CTC loss (Graves et al. 2006) on each row teaches the connector to put every visual token on
the character it shows, without running the LLM; blank is the newline token, classes are single-character tokens.
Repeats are not merged, as in the Recurrent Neural Aligner (Sak et al. 2017): a character takes exactly one column, so
that "11" is two columns and the LLM has only blanks to pass over. Greedy decoding shows what the LLM is being shown.
"""

import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..errors import ConfigError
from ..preprocessing.tiling import Tiling, choose_grid, plan_tiles

CHARACTERS = "".join(c for c in string.printable if c.isprintable())
_IMPOSSIBLE = -1e30
"""Log-probability of no path; finite, because the gradient of logaddexp at two infinities is not a number."""


@dataclass(frozen=True, slots=True)
class Alphabet:
    """The columns of P_vocab that are read.

    Args:
        columns: Token ids; the first is the blank (newline), the others the characters' tokens.
        characters: Characters in the order of `columns[1:]`.
    """

    columns: tuple[int, ...]
    characters: str

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "Alphabet":
        """Take the single-token printable ASCII characters of a tokenizer.

        Raises:
            ConfigError: If the newline or more than a tenth of the characters are not single tokens.
        """
        ids = {c: tokenizer(c, add_special_tokens=False)["input_ids"] for c in "\n" + CHARACTERS}
        single = [c for c in CHARACTERS if len(ids[c]) == 1]
        if len(ids["\n"]) != 1 or len(single) < 0.9 * len(CHARACTERS):
            raise ConfigError(
                f"the tokenizer writes {len(single)} of {len(CHARACTERS)} printable characters (newline: "
                f"{ids[chr(10)]}) "
                "as one token each; the read warm start needs a character token for nearly all of them"
            )
        return cls((ids["\n"][0], *(ids[c][0] for c in single)), "".join(single))

    def encode(self, text: str) -> list[int]:
        """Class indices (1-based, 0 is blank) of a text; accents are stripped, unknown characters dropped."""
        plain = unicodedata.normalize("NFKD", " ".join(text.split()))
        return [self.characters.index(c) + 1 for c in plain if c in self.characters]

    def decode(self, classes: Sequence[int]) -> str:
        """Greedy decoding: drop blanks."""
        return " ".join("".join(self.characters[c - 1] for c in classes if c).split())


def to_rows(values: Tensor, grid: tuple[int, int], token_grid: tuple[int, int]) -> Tensor:
    """Lay an image's tiles out as rows of the page.

    Args:
        values: (rows · cols tiles, h · w tokens, C), tiles row-major and tokens row-major, no thumbnail.
        grid: Rows and columns of tiles.
        token_grid: Rows h and columns w of tokens in a tile.

    Returns:
        (rows · h, cols · w, C).
    """
    (rows, cols), (height, width) = grid, token_grid
    laid = values.reshape(rows, cols, height, width, -1).permute(0, 2, 1, 3, 4)
    return laid.reshape(rows * height, cols * width, -1)


def row_texts(
    lines: Sequence[dict[str, Any]], size: tuple[int, int], tiling: Tiling, token_rows: int
) -> tuple[tuple[int, int], list[str]]:
    """The text of every token row of an image.

    Args:
        lines: `{"text", "box": [x0, y0, x1, y1]}` in pixels of the image.
        size: Width and height of the image in pixels.
        tiling: Its tiling.
        token_rows: Rows of tokens in one tile.

    Returns:
        The grid (rows, cols) and rows · token_rows texts, empty where no line has its centre; lines that share a row
        are joined from left to right.
    """
    grid = choose_grid(size[0], size[1], tiling)
    found: list[list[tuple[float, str]]] = [[] for _ in range(grid.rows * token_rows)]
    for line in lines:
        x0, y0, _, y1 = line["box"]
        found[_row_of((y0 + y1) / 2, size, tiling, token_rows)].append((x0, line["text"]))
    return (grid.rows, grid.cols), [" ".join(text for _, text in sorted(row)) for row in found]


def ctc_loss(rows: Tensor, targets: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """CTC loss of rows of visual tokens.

    Args:
        rows: (R, T, C) log-probabilities, column 0 the blank.
        targets: R lists of class indices, possibly empty.

    Returns:
        The sum over rows in float32 (float64 for such rows), and the number of characters (an empty row counts as
        one). Rows with too few columns for their text count as zero loss.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    lengths = torch.tensor([len(target) for target in targets], device=rows.device)
    padded = pad_sequence([torch.tensor(target, dtype=torch.long) for target in targets], batch_first=True)
    emit = rows.gather(2, padded.to(rows.device)[:, None].expand(-1, rows.shape[1], -1))
    # paths[r, n]: log-probability of having written the first n characters of row r after the columns so far.
    paths = rows.new_full((len(targets), padded.shape[1] + 1), _IMPOSSIBLE)
    paths[:, 0] = 0.0
    for blank, characters in zip(rows[..., :1].unbind(1), emit.unbind(1), strict=True):
        written = F.pad(paths[:, :-1] + characters, (1, 0), value=_IMPOSSIBLE)
        paths = torch.logaddexp(paths + blank, written)
    losses = -paths.gather(1, lengths[:, None]).squeeze(1)
    return losses[lengths <= rows.shape[1]].sum(), lengths.clamp(min=1).sum().to(losses)


def read_rows(rows: Tensor, alphabet: Alphabet) -> list[str]:
    """Greedy text of every row of (R, T, C) log-probabilities."""
    return [alphabet.decode(row) for row in rows.argmax(dim=-1).tolist()]


def _row_of(y: float, size: tuple[int, int], tiling: Tiling, token_rows: int) -> int:
    """Token row of the page (counted over all tile rows) that holds pixel row `y` of the image."""
    cols = choose_grid(size[0], size[1], tiling).cols
    starts = [box for box in plan_tiles(size[0], size[1], tiling) if not box.is_thumbnail][::cols]
    tile_row = max(index for index, box in enumerate(starts) if box.top <= max(y, 0.0))
    inside = starts[tile_row].to_tile((0, y, 0, y))[1]
    row = int(inside * token_rows / tiling.tile_height)
    return tile_row * token_rows + min(max(row, 0), token_rows - 1)
