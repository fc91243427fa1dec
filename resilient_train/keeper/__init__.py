"""L4: the keeper, one process per node: owns the images in shared memory, persists them, serves them."""
