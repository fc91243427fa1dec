"""A slow disk: with this folder in PYTHONPATH every flush to the device takes SLOW_FSYNC seconds longer."""

import os
import time

_fsync = os.fsync


def _slow(descriptor: int) -> None:
    time.sleep(float(os.environ["SLOW_FSYNC"]))
    _fsync(descriptor)


os.fsync = _slow
