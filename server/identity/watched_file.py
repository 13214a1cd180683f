"""A file that is read anew when it changes. What cannot be read leaves the last good content in force."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from rudder.server.config import ConfigError, Tls
from rudder.server.monitoring.logs import fields

T = TypeVar("T")
# A change is noticed within this time: a look at the file for each call would cost more than the call.
CHECK_S = 1.0
Version = tuple[int, int, int]

logger = logging.getLogger(__name__)


class WatchedFile(Generic[T]):
    """The parsed content of a file, or of several that belong together, such as a certificate and its key.

    `parse` takes the bytes of each file, and raises ValueError on what it does not accept. `failed` is called with
    `what` when a changed file is not accepted. The first reading raises ValueError or OSError to the caller.
    """

    def __init__(
        self, what: str, paths: tuple[Path, ...], parse: Callable[..., T], failed: Callable[[str], None]
    ) -> None:
        self.what, self.paths, self.parse, self.failed = what, paths, parse, failed
        self.version = self.look()
        self.content = self.read()
        self.checked = time.monotonic()

    def current(self) -> T:
        """Return the content in force."""
        now = time.monotonic()
        if now - self.checked >= CHECK_S:
            self.checked = now
            self.reload()
        return self.content

    def reload(self) -> None:
        """Read the files if they have changed."""
        try:
            version = self.look()
            if version == self.version:
                return
            # Also of a file that is refused: it is read again when it changes again.
            self.version = version
            self.content = self.read()
            logger.info("file reloaded", extra=fields(what=self.what, path=str(self.paths[0])))
        except (OSError, ValueError) as error:
            self.failed(self.what)
            problem = f"{type(error).__name__}: {error}"
            logger.error("a changed file is not in force", extra=fields(what=self.what, error=problem))

    def read(self) -> T:
        """Read and parse the files."""
        return self.parse(*(path.read_bytes() for path in self.paths))

    def look(self) -> tuple[Version, ...]:
        """Return what tells that a file has changed. A secret that is mounted as a volume is a link that moves."""
        stats = [path.stat() for path in self.paths]
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)


def watched_pair(tls: Tls, parse: Callable[..., T], failed: Callable[[str], None]) -> WatchedFile[T] | None:
    """Watch certificate, key and clients' authorities of a door, as `parse` takes them; None without TLS.

    Raises ConfigError.
    """
    if tls.certificate is None:
        return None
    if tls.key is None:
        raise ConfigError("tls.key", "is missing: it belongs to tls.certificate")
    paths = [Path(tls.certificate), Path(tls.key), *([Path(tls.client_ca)] if tls.client_ca else [])]
    try:
        return WatchedFile("tls.certificate", tuple(paths), parse, failed)
    except (OSError, ValueError) as error:
        raise ConfigError("tls.certificate", str(error)) from error
