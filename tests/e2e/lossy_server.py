"""`rudder.server`, but from SIGUSR1 on every telemetry frame that arrives is found forged."""

import signal
import sys
from typing import Any

from rudder.server.cli import main
from rudder.server.engine.telemetry import channel
from rudder.server.engine.telemetry.frame import Frame, unseal


def forge_on_signal() -> None:
    """Cut a byte off each message that arrives after the signal."""
    forged = False

    def on_signal(*_: Any) -> None:
        nonlocal forged
        forged = True

    def unseal_forged(message: bytes, key: bytes, expected: int) -> Frame:
        return unseal(message[:-1] if forged else message, key, expected)

    signal.signal(signal.SIGUSR1, on_signal)
    channel.unseal = unseal_forged  # type: ignore[attr-defined]


if __name__ == "__main__":
    forge_on_signal()
    sys.exit(main())
