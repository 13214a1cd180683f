"""The bill of materials has every pinned package with its hashes, and nothing that varies."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
FILES = [REQUIREMENTS / name for name in ("cpu.txt", "torch.txt", "test.txt", "conformance.txt")]


@pytest.fixture(scope="module")
def sbom() -> Any:
    spec = importlib.util.spec_from_file_location("sbom", REQUIREMENTS / "sbom.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pin_is_in_the_bill_with_every_hash(sbom: Any) -> None:
    bill = sbom.bill(FILES)
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    found = {(c["name"], c["version"]): {p["value"] for p in c["properties"]} for c in bill["components"]}
    assert len(found) > 150
    for file in FILES:
        text = file.read_text()
        pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE)
        assert set(pins) <= found.keys()
        assert set(re.findall(r"sha256:([0-9a-f]{64})", text)) <= set().union(*found.values())
    references = [component["bom-ref"] for component in bill["components"]]
    assert len(set(references)) == len(references)


def test_the_bill_follows_the_files_alone(sbom: Any, tmp_path: Path) -> None:
    assert sbom.bill(FILES) == sbom.bill(FILES)
    changed = tmp_path / "cpu.txt"
    changed.write_text(FILES[0].read_text().replace("sha256:2", "sha256:3", 1))
    assert sbom.bill([changed])["serialNumber"] != sbom.bill(FILES[:1])["serialNumber"]


def test_a_line_that_pins_nothing_is_refused(sbom: Any) -> None:
    with pytest.raises(ValueError, match="'requests>=2' pins no package"):
        list(sbom.components_of("# comment\n\nrequests>=2\n"))
