"""L2: decisions. Pure functions and state machines; time and randomness are arguments."""
