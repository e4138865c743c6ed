"""Files that benchmarks are published in -> samples in the sample schema (no torch here)."""
