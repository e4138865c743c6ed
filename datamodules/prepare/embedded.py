"""`prepare embedded`: convert the weights of the embedded default model into the cache."""

import argparse
import sys
from collections.abc import Sequence

from alignvlm_pl.pretrained.pp_ocr import ensure_pp_ocr_trunk
from alignvlm_pl.pretrained.smollm2 import ensure_smollm2


def main(argv: Sequence[str]) -> None:
    """Convert the weights that are not in the cache yet, and print one `part: folder` per line."""
    parser = argparse.ArgumentParser(prog="prepare embedded", description=__doc__)
    parser.parse_args(list(argv))
    for part, ensure in {"vision_encoder": ensure_pp_ocr_trunk, "language_model": ensure_smollm2}.items():
        sys.stdout.write(f"{part}: {ensure()}\n")
