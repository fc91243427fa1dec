"""Where torchrun finds `resilient_train.control.torchelastic`.

torch loads its plug-ins while it imports its own rendezvous, which theirs need: so this module needs nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def handler() -> Callable[[Any], Any]:
    """What torchrun's entry-point group ``torchrun.handlers`` asks for."""
    return _create


def _create(parameters: Any) -> Any:
    from resilient_train.control.torchelastic import create

    return create(parameters)
