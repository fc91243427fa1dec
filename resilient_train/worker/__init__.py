"""L4: what the user's script imports."""
