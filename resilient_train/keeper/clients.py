"""Who is connected to a keeper on its own node."""

from __future__ import annotations

from dataclasses import dataclass

from resilient_train.ipc.channel import Channel


@dataclass
class Client:
    """A connected worker."""

    channel: Channel
    member: str = ""
    index: int = -1
    """Its line on the board."""
    polite: bool = False
    """It said goodbye."""
