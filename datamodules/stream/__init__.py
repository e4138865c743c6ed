"""Which sample comes at which position on which rank; no I/O."""
