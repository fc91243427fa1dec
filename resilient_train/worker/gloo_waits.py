"""Waits for transfers of gloo's, which it does not end itself when a connection fails in the middle of one.

See `csrc/gloo_waits.hpp`.  Where the extension is not built, or torch has another gloo than those that are known, such
a wait ends with the collective's timeout, and the process is replaced long before that.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

_state = {"said": False}


def watch() -> bool:
    """Know of all waits that begin from now on; False if that cannot be had."""
    try:
        from resilient_train import _native
    except ImportError:
        return False
    watched = bool(_native.watch_gloo_waits())
    if not watched and not _state["said"]:
        _state["said"] = True
        logger.warning("this torch has a gloo that is not known: a rank may not come free in the middle of a transfer")
    return watched


def end() -> int:
    """Make all of them in this process fail, with a RuntimeError where the collective is waited for; their number."""
    try:
        from resilient_train import _native
    except ImportError:
        return 0
    return int(_native.end_gloo_waits())
