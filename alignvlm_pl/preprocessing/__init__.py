"""Images to tiles, conversations to token ids and labels: what happens before the model."""
