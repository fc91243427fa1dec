"""``python -m resilient_train.keeper NAME LINES LINGER``: started by an agent or a `Checkpointer`, not by hand."""

from __future__ import annotations

import signal
import sys
import time

from resilient_train.ipc.channel import Listener
from resilient_train.keeper.keeper import Keeper


def main() -> None:
    """Serve at an abstract address until nobody needs this keeper."""
    name, lines, linger = sys.argv[1:]
    # Ctrl-C and a launcher's SIGTERM reach the whole group; the keeper still has to save the last state.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Keeper(Listener(name), int(lines), float(linger), time.monotonic).run()


if __name__ == "__main__":
    main()
