"""resilient_train: a PyTorch job that loses a process goes on in the processes that are left.

The public names are loaded on first use, so that the keeper and the command lines start without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilient_train.worker.checkpointer import Checkpointer as Checkpointer
    from resilient_train.worker.sampler import ElasticSampler as ElasticSampler
    from resilient_train.worker.sampler import MicroBatch as MicroBatch
    from resilient_train.worker.session import elastic as elastic
    from resilient_train.worker.state import State as State
    from resilient_train.worker.stream import ElasticStream as ElasticStream
    from resilient_train.worker.stream import StreamBatch as StreamBatch
    from resilient_train.worker.token_mean import mean_over_tokens as mean_over_tokens
    from resilient_train.worker.world import World as World

__version__ = "0.1.0"

_PUBLIC = {
    "Checkpointer": "resilient_train.worker.checkpointer",
    "ElasticSampler": "resilient_train.worker.sampler",
    "ElasticStream": "resilient_train.worker.stream",
    "MicroBatch": "resilient_train.worker.sampler",
    "State": "resilient_train.worker.state",
    "StreamBatch": "resilient_train.worker.stream",
    "World": "resilient_train.worker.world",
    "elastic": "resilient_train.worker.session",
    "mean_over_tokens": "resilient_train.worker.token_mean",
}

__all__ = [
    "Checkpointer",
    "ElasticSampler",
    "ElasticStream",
    "MicroBatch",
    "State",
    "StreamBatch",
    "World",
    "__version__",
    "elastic",
    "mean_over_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
