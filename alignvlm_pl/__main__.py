"""`python -m alignvlm_pl`, the same as the console script `alignvlm`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
