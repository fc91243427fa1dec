"""L5: command lines."""
