"""L3: how the processes of one node talk to each other."""
