"""Folders for Unix sockets, whose paths have at most 107 bytes (unix(7))."""

import os
import tempfile
from pathlib import Path

from rudder.sae_models.errors import UserError

MAX_PATH_BYTES = 107
# What is added to the folder: "/rudder-xxxxxxxx/telemetry", and vLLM's "/" with a UUID.
NAME_BYTES = 40
SHORT_FOLDERS = ("/tmp", "/dev/shm", "/run")


def socket_folder() -> str:
    """Return the folder of temporary files, or a short one where its path leaves no room. UserError: there is none."""
    for folder in (tempfile.gettempdir(), *SHORT_FOLDERS):
        if len(os.fsencode(folder)) + NAME_BYTES <= MAX_PATH_BYTES and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise UserError(f"TMPDIR: {Path(tempfile.gettempdir())} is too long for a socket: set it to a short folder")
