"""Write the software bill of materials of the pinned packages in requirements/*.txt, as CycloneDX 1.6 (ECMA-424).

    python requirements/sbom.py cpu.txt torch.txt …

It has the name, version and hashes of each package, and is the same for the same files: a change of a requirement is a
change of the bill. The environment is these packages and no others (`pip install --no-deps --require-hashes`).
"""

import hashlib
import json
import re
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)")
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
FOLDER = Path(__file__).parent


def main() -> None:
    """Print the bill of the files of the command line."""
    print(json.dumps(bill(FOLDER / name for name in sys.argv[1:]), indent=1))


def bill(files: Iterable[Path]) -> dict[str, Any]:
    """Return the bill of requirement files."""
    components: dict[str, dict[str, Any]] = {}
    for file in files:
        for component in components_of(file.read_text(encoding="utf-8")):
            components.setdefault(component["bom-ref"], component)
    ordered = [components[name] for name in sorted(components)]
    digest = hashlib.sha256(json.dumps(ordered).encode()).hexdigest()
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.UUID(digest[:32], version=4)}",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "rudder-server", "bom-ref": "rudder-server"}},
        "components": ordered,
    }


def components_of(text: str) -> Iterator[dict[str, Any]]:
    """Yield the components of a requirement file. ValueError: a line is neither a pin nor a comment."""
    for line in text.replace("\\\n", " ").splitlines():
        pin = PIN.match(line)
        if pin is None and line.strip() and not line.startswith("#"):
            raise ValueError(f"{line!r} pins no package")
        if pin:
            yield component_of(pin[1], pin[2], HASH.findall(line))


def component_of(name: str, version: str, hashes: Iterable[str]) -> dict[str, Any]:
    """Return a package. Each of its hashes is of a file that an installation may choose, by Python version."""
    purl = f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{version.replace('+', '%2B')}"
    properties = [{"name": "rudder:file:sha256", "value": digest} for digest in hashes]
    return {
        "type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl, "properties": properties,
    }  # fmt: skip


if __name__ == "__main__":
    main()
