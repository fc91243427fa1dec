"""Read a shard image's tensors, verified: see `resilient_train.image.verified`."""

from __future__ import annotations

import numpy as np
import torch

from resilient_train.errors import CheckpointDamaged
from resilient_train.image.snapshot import TORCH_DTYPES
from resilient_train.image.verified import Elsewhere, VerifiedImage
from resilient_train.spec.shard import Entry


class ImageReader(VerifiedImage):
    """A verified image whose entries are torch tensors."""

    def tensor(self, entry: Entry) -> torch.Tensor:
        """One entry's elements in its stored dtype and shape; a read-only view where the bytes allow it.

        Raises:
            CheckpointDamaged: if a block it stands in fails its checksum.
        """
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointDamaged(f"{self.name}: {entry.name} has dtype {entry.dtype}, which torch lacks")
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        array = np.frombuffer(self.data(entry), dtype=np.uint8)
        if not array.flags.writeable or array.ctypes.data % dtype.itemsize:
            array = array.copy()
        return torch.from_numpy(array).view(dtype).view(entry.shape)


def memory_reader(name: str, view: memoryview, elsewhere: Elsewhere = lambda: False) -> ImageReader:
    """A reader of an image in mapped memory; ``view`` must stay locked against its writer while it is used."""
    address = np.frombuffer(view, dtype=np.uint8).ctypes.data

    def read(offset: int, length: int) -> memoryview:
        return view[offset : offset + length]

    return ImageReader(name, len(view), read, address=address, elsewhere=elsewhere)
