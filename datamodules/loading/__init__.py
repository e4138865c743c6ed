"""DataLoaders: positions of the stream become batches, in worker processes."""
