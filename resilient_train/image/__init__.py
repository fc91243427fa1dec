"""L3: tensors to shard images in shared memory, and back."""
