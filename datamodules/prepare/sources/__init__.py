"""Files that benchmarks are published in -> samples in normal form (no torch here)."""
