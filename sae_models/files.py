"""Atomic file writes, and folders with a single writer."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside `path`, flush it to disk and rename it to `path`. On failure raise OSError with the path of
    the file and leave no file behind.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with naming_file_in_errors(path), partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def naming_file_in_errors(path: Path) -> Iterator[None]:
    """Within the block, re-raise an OSError with the path of the file: errors of write() carry none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Within the block, fill a temporary folder beside `path`; after it, rename that to `path`, in place of an older
    folder. On failure leave `path` as it is and no files behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch) / path.name
        folder.mkdir()
        yield folder
        if path.exists():
            path.rename(Path(scratch) / "replaced")
        folder.rename(path)


@contextmanager
def lock_folder(folder: Path, wait: bool = False) -> Iterator[None]:
    """Within the block, hold an exclusive lock on the folder, creating the folder if necessary. If another process
    holds the lock, wait for it, or raise BlockingIOError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BlockingIOError(f"{folder}: another process writes in it") from error
        yield
