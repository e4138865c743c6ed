"""How a model and its training state are spread over ranks, and saved."""
