"""Files, paths, signals and collectives that all other packages may use."""
