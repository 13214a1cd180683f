"""The JSON schema of policy files is the contract's, takes what the server takes, and is the one that is published."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from google.protobuf import json_format

from rudder.server.program.schema import schema_of
from rudder.v1 import policy_pb2
from tests.unit.policies import editing, latent, message
from tests.unit.programs import PROBE, SITE

SCHEMA = schema_of(policy_pb2.Policy.DESCRIPTOR)
VALIDATOR: Any = jsonschema.Draft202012Validator(SCHEMA)
PUBLISHED = Path(__file__).parents[4] / "docs" / "policy.schema.json"
GATE = {"site": SITE, "sequence": {"score": PROBE, "cusum": {"drift": 1}, "level": 2, "latch": True}}
GUARD = {
    "name": "g",
    "score": {"terms": [{"site": SITE, "row": latent(1), "weight": 1}]},
    "action": "GUARD_ACTION_STOP",
}


def test_published_schema_is_this_one() -> None:
    """`rudder policy schema > docs/policy.schema.json` writes it."""
    assert json.loads(PUBLISHED.read_text()) == SCHEMA


def test_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert {field.name for field in policy_pb2.Policy.DESCRIPTOR.fields} == SCHEMA["$defs"]["Policy"][
        "properties"
    ].keys()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"program": editing(5, gate=GATE), "guards": [GUARD | {"agreement": {"above": 1, "tokens": 3}}]},
        {"locked": [{"site": SITE, "row": latent(2)}], "rights": {"edit_latents": True}, "max_displacement": 0.5},
        {"mode": "POLICY_MODE_SHADOW", "forbidden_fields": ["sampling.n"], "refusal": "no"},
    ],
)
def test_policy_fits_its_schema(fields: dict[str, Any]) -> None:
    document = json_format.MessageToDict(message(**fields), preserving_proto_field_name=True)
    VALIDATOR.validate(document | {"version": 1})


@pytest.mark.parametrize(
    "text",
    [
        "name: 3",
        "gates: []",
        "version: -1",
        "mode: POLICY_MODE_OFF",
        "bundles: {a: 1}",
        "guards: {}",
        "guards: [{share: {}, window: {tokens: 3}}]",
        "program: {sites: [{edits: [{set: 1, add: 2}]}]}",
        "program: {sites: [{edits: [{set: much}]}]}",
        "max_displacement: [1]",
    ],
)
def test_what_the_server_refuses_does_not_fit(text: str) -> None:
    document = yaml.safe_load(text)
    with pytest.raises(json_format.ParseError):
        json_format.ParseDict(document, policy_pb2.Policy())
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(document)
