"""The scores that the AlignVLM paper (arXiv 2502.01341) prints, in per cent."""

_TABLES = """
                                docvqa  infovqa  deepform    klc    wtq  tabfact  chartqa  textvqa  tablevqa
Qwen2-VL-2B (base+)              57.23    31.88     49.31  34.39  31.61    64.75    68.60    61.01     47.53
AlignVLM-Llama-3.2-1B            72.42    38.16     60.47  33.71  28.66    71.31    65.44    48.81     50.29
AlignVLM-Llama-3.2-3B            79.63    44.53     63.49  35.25  38.59    78.51    71.88    57.38     60.10
DocOwl1.5-8B (base+)             78.70    47.62     64.39  36.93  35.69    72.65    65.80    67.30     49.03
Llama3.2-11B (base+)             78.99    44.27     67.05  37.22  40.18    78.04    71.40    68.46     56.73
AlignVLM-Llama-3.1-8B            81.18    53.75     63.25  35.50  45.31    83.04    75.00    64.60     64.33
3B, MLP connector                71.46    37.56     62.07  33.36  28.94    73.22    66.48    53.56     50.96
3B, Perceiver Resampler          69.08    34.13     57.08  31.75  27.95    71.93    65.16    51.33     47.76
3B, Ovis                         74.68    42.11     58.02  33.50  33.13    76.67    67.92    52.60     53.93
3B ALIGN, 3.4K embeddings kept   79.40    44.13     63.64  35.02  38.26    78.83    71.72    57.48     59.80

                                docvqa  infovqa  chartqa  textvqa    gqa   mmmu  mmvet   pope   seed
low-data 3B, MLP                 42.11    19.93    48.44    51.97  57.62  33.33  31.14  87.35  58.54
low-data 3B, Perceiver           32.18    18.10    40.00    44.31  55.86  35.22  26.19  84.92  63.70
low-data 3B, Ovis                57.73    26.39    54.52    55.60  56.23  31.89  30.41  88.26  60.97
low-data 3B, H-Reducer           34.59    17.57    45.64    47.13  58.24  35.00  28.39  87.48  61.82
low-data 3B, HoneyBee            55.86    19.36    55.32    58.13  54.79  32.11  34.31  89.28  61.18
low-data 3B, ALIGN               71.43    30.50    69.72    65.63  61.67  35.33  35.32  88.85  63.27

                                vcr_easy  vcr_hard
3B, ALIGN                          65.84     48.07
3B, MLP connector                  51.43     37.89
"""


def _read() -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = {}
    for table in _TABLES.strip("\n").split("\n\n"):
        header, *rows = table.splitlines()
        names = header.split()
        for row in rows:
            model, *values = row.rsplit(maxsplit=len(names))
            for name, value in zip(names, values, strict=True):
                scores.setdefault(name, {})[model.strip()] = float(value)
    return scores


PAPER = _read()
"""Benchmark -> model -> score."""
