"""`prepare SOURCE`: shards from raw data, or the embedded weights; see `datamodules.prepare`."""


def run(argv: list[str]) -> int:
    """Pass the options on; nothing here loads torch."""
    from datamodules.prepare import main

    return main(argv[1:]) or 0
