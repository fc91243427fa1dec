"""A cluster without a cluster: the machines of `resilient_train.plan` under a manual clock and seeded faults."""
