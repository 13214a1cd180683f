"""Refresh the hashes of the pinned packages in requirements/*.txt.

    python requirements/lock.py cpu.txt test.txt …

To move to another version, change it in the file and run `make lock`. Comments and order stay. Hashes are of the wheels
for Linux on x86-64 and the Python versions below; a package without such a wheel gets the hash of its source archive
instead, so that pip never falls back from a wheel to a build. torch.txt is kept by hand: see there.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

PYTHONS = ("3.11", "3.12", "3.13")
# Of files that one Python alone installs: the image's.
PYTHONS_OF = {"cuda.txt": ("3.11",)}
PIN = re.compile(r"^([A-Za-z0-9._-]+)==[^\s;]+")


def main() -> None:
    for name in sys.argv[1:]:
        file = Path(__file__).parent / name
        lines = [line for line in file.read_text().splitlines() if not line.startswith("    --hash")]
        pins = [line.removesuffix(" \\") for line in lines]
        hashes = hashes_of([pin for pin in pins if PIN.match(pin)], PYTHONS_OF.get(name, PYTHONS))
        file.write_text("".join(locked(pin, hashes) for pin in pins))


def hashes_of(pins: list[str], pythons: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the sha256 of every file that a pin may install, by normalized package name."""
    hashes: dict[str, set[str]] = {}
    for python in pythons:
        for package in resolve(pins, python):
            files = package.get("wheels") or [package["sdist"]]
            hashes.setdefault(package["name"], set()).update(file["hashes"]["sha256"] for file in files)
    return {name: sorted(digests) for name, digests in hashes.items()}


def resolve(pins: list[str], python: str) -> list[dict[str, Any]]:
    """Return the packages of the lock file (PEP 751) that uv writes for one Python version."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "pylock.toml"
        target = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_35"]
        command = ["uv", "pip", "compile", "--quiet", "--no-deps", *target, "--output-file", str(lock), "-"]
        subprocess.run(command, input="\n".join(pins), text=True, check=True)
        return list(tomllib.loads(lock.read_text())["packages"])


def locked(line: str, hashes: dict[str, list[str]]) -> str:
    match = PIN.match(line)
    if match is None:
        return line + "\n"
    name = re.sub(r"[-_.]+", "-", match[1]).lower()
    return " \\\n    ".join([line, *(f"--hash=sha256:{digest}" for digest in hashes[name])]) + "\n"


if __name__ == "__main__":
    main()
