"""A trained model at work: pages of files, answers to questions about them, and records of both; docs/reading.md."""
