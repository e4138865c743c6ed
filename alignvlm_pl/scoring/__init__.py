"""Predictions to scores, intervals and reports of benchmarks; nothing here needs torch."""
