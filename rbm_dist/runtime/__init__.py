"""Everything Ray: the cluster, tasks, inference actors, training groups, the memory-store actor, progress."""
