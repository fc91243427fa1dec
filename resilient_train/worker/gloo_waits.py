"""Waits for transfers of gloo's, which it does not end itself when a connection fails in the middle of one.

See `csrc/gloo_waits.hpp`.  Where the extension is not built, or torch has another gloo than those that are known, such
a wait ends with the collective's timeout, and the process is replaced long before that.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from resilient_train.image.native import engine

logger = logging.getLogger(__name__)

_engine: Any = engine


def watch() -> bool:
    """Know of all waits that begin from now on; False if that cannot be had."""
    if not hasattr(_engine, "watch_gloo_waits"):
        return False
    watched = bool(_engine.watch_gloo_waits())
    if not watched:
        _say_unknown()
    return watched


@functools.cache
def _say_unknown() -> None:
    logger.warning("this torch has a gloo that is not known: a rank may not come free in the middle of a transfer")


def end() -> int:
    """Make all of them in this process fail, with a RuntimeError where the collective is waited for; their number."""
    return int(_engine.end_gloo_waits()) if hasattr(_engine, "end_gloo_waits") else 0
