"""A slow disk: with this folder in PYTHONPATH every flush of a file to the device takes SLOW_FSYNC seconds longer."""

import os
import stat
import time

_fsync = os.fsync


def _slow(descriptor: int) -> None:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        time.sleep(float(os.environ["SLOW_FSYNC"]))
    _fsync(descriptor)


os.fsync = _slow
