"""Partitioners, shards, the store over them, and neighbour sampling. Knows nothing of Ray."""
