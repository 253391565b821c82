"""The training half: shards to batches."""
