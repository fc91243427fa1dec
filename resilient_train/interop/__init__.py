"""Between L4 and L5: our checkpoints through the interfaces of other libraries, and their checkpoints as ours.

`resilient_train.interop.dcp` is what users import for ``torch.distributed.checkpoint``; ``docs/dcp.md`` shows how.
"""
