"""`rudder.server`, whose clock jumps a day ahead at SIGUSR1, and a day back at SIGUSR2."""

import signal
import sys
import time

from rudder.server.cli import main

DAY_S = 86_400.0
now = time.time
ahead_s = 0.0


def jump(seconds: float) -> None:
    """Set the clock of this process."""
    global ahead_s
    ahead_s += seconds


if __name__ == "__main__":
    time.time = lambda: now() + ahead_s
    signal.signal(signal.SIGUSR1, lambda *_: jump(DAY_S))
    signal.signal(signal.SIGUSR2, lambda *_: jump(-DAY_S))
    sys.exit(main())
