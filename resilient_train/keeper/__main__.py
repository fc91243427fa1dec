"""``python -m resilient_train.keeper NAME LINES LINGER``: started by an agent or a `Checkpointer`, not by hand.

LINGER is the number of seconds to live on without workers, or ``agent PID``: wait for that agent and end with it.
"""

from __future__ import annotations

import signal
import sys

from resilient_train.clock import MonotonicClock
from resilient_train.errors import LinkLost
from resilient_train.ipc.channel import Listener
from resilient_train.keeper.keeper import Keeper


def main() -> None:
    """Serve at an abstract address until nobody needs this keeper."""
    name, lines, linger, *rest = sys.argv[1:]
    # Ctrl-C and a launcher's SIGTERM reach the whole group; the keeper still has to save the last state.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        listener = Listener(name)
    except LinkLost:
        # Another keeper serves this job on this node already.
        return
    if linger == "agent":
        Keeper(listener, int(lines), None, MonotonicClock(), starter=int(rest[0])).run()
    else:
        Keeper(listener, int(lines), float(linger), MonotonicClock()).run()


if __name__ == "__main__":
    main()
