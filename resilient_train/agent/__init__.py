"""L4: the agent, one process per node: liveness, the agreed world, the worker processes."""
