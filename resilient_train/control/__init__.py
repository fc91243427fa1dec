"""L3: the agreed record and the liveness of nodes."""
