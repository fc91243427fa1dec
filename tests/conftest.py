"""Nothing a test starts may outlive it."""
