"""The dataset format on disk: tar shards, manifest, sample index; reading, writing, checking."""
