"""L1: values. No clock, IO, threads, torch or randomness."""
