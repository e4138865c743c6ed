"""Paint a page with what ALIGN's P_vocab reads at each place: the export of a stage, loaded without Lightning.

python examples/readout.py runs/demo/3-instruct/hf page.png painted.png

A number after it, such as 0.5, is the mass on the newline above which a visual token is blank and may be left out of
the LLM's sequence (`connector.collapse`).
"""

import math
import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

import alignvlm_pl.models  # noqa: F401  (registers the model with the Auto classes)
from alignvlm_pl.models.collapse import Collapse, resolve_names
from alignvlm_pl.models.token_readout import read_page
from alignvlm_pl.preprocessing.imaging import load_image
from alignvlm_pl.scoring.readout_page import paint_readout


def paint(folder: str, page: str, target: str, mass: str | None = None) -> None:
    """Write an image file's page with what the model in `folder` reads on it."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    connector, image = model.connector, load_image(page)
    if mass is not None:
        option = resolve_names({"mass": mass, "tokens": "newline"}, lambda: processor.tokenizer, connector.row_ids())
        connector.collapse = Collapse.from_option(option, connector.row_ids())
    tokens = read_page(model, processor, image)
    paint_readout(image, tokens, most=math.log(connector.rows)).save(target, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    paint(*sys.argv[1:])
