"""Raw data -> globally shuffled shards: in bounded memory, in parallel, resumable, deterministic (no torch here)."""
