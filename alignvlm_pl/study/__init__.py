"""Studies: the paper's comparisons, each from one file; docs/study.md."""
