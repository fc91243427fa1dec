"""What users of ``torch.distributed.checkpoint`` (DCP) import: `Writer` for ``dcp.save``, `Reader` for ``dcp.load``.

Example::

    import torch.distributed.checkpoint as dcp
    from resilient_train.interop import dcp as rt_dcp

    dcp.save(state_dict, storage_writer=rt_dcp.Writer("s3://bucket/run-1", step=1200))
    dcp.load(state_dict, storage_reader=rt_dcp.Reader("s3://bucket/run-1"))
"""

from __future__ import annotations

from resilient_train.interop.dcp_reader import Reader as Reader
from resilient_train.interop.dcp_writer import Writer as Writer

__all__ = ["Reader", "Writer"]
