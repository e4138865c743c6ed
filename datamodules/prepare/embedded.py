"""`prepare embedded`: convert the weights of the embedded default once, and say where they lie."""

import argparse
import sys
from collections.abc import Sequence

from alignvlm_pl.pretrained import prepare_embedded


def main(argv: Sequence[str]) -> int:
    """Convert the weights if that has not been done, and print one folder per line."""
    parser = argparse.ArgumentParser(prog="prepare embedded", description=__doc__)
    parser.parse_args(list(argv))
    for part, folder in prepare_embedded().items():
        sys.stdout.write(f"{part}: {folder}\n")
    return 0
