"""The policy of docs/policies.md is valid on the server that ships, and the document names every field and right."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rudder.server import config as configuration
from rudder.server.program.named import read_policy
from rudder.server.safety.binding import ALL_RIGHTS
from rudder.server.safety.explain import RIGHT_TEXTS
from rudder.server.safety.offline import problems_offline
from rudder.v1 import policy_pb2

DOCUMENT = (Path(__file__).parents[4] / "docs" / "policies.md").read_text()
EXAMPLE = DOCUMENT.partition("```yaml\n")[2].partition("```")[0]


def problems(folder: Path, **fields: Any) -> list[str]:
    """The fields at fault of the documented policy with some fields changed."""
    path = folder / "policy.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(EXAMPLE) | fields))
    return [field for field, _ in problems_offline(read_policy(path), configuration.load(), folder)]


def test_documented_policy_is_valid(tmp_path: Path) -> None:
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"bundles": {"textbook-lm-layers.2": "0"}}, "bundles[textbook-lm-layers.2]"),
        ({"version": 0}, "version"),
        ({"forbidden_fields": ["sampling.x"]}, "forbidden_fields[0]"),
    ],
)
def test_changed_policy_is_not(fields: dict[str, Any], field: str, tmp_path: Path) -> None:
    assert problems(tmp_path, **fields) == [field]


def test_every_field_and_right_is_documented() -> None:
    for field in policy_pb2.Policy.DESCRIPTOR.fields:
        assert f"`{field.name}`" in DOCUMENT
    for right in ALL_RIGHTS:
        assert f"`{right}`" in DOCUMENT
    assert RIGHT_TEXTS.keys() == ALL_RIGHTS
