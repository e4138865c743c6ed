"""Answers -> figures, intervals and reports of benchmarks; only metric.py needs torch."""
