"""Run the command line from a checkout: `python cli.py fit ...`; once installed it is called `alignvlm`."""

from alignvlm_pl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
