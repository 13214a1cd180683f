"""A policy that is applied to a running server binds the next call, says so, and can be taken back."""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf import json_format

from rudder.v1 import policy_pb2
from rudder_client import AsyncClient, Client, RudderError
from tests.e2e.conftest import Running

pytestmark = pytest.mark.e2e
SITE, LATENT = "layers.2.resid_post", 7


def message(client: Client, **fields: Any) -> policy_pb2.Policy:
    """A policy that binds everybody."""
    bundles = {bundle.name: bundle.sha256 for bundle in client.model().bundles}
    row = {"feature": {"bundle": next(iter(bundles)), "index": LATENT}}
    program = {"sites": [{"site": SITE, "edits": [{"row": row, "set": 3.0}]}]}
    document = {"name": "low", "version": 1, "binds": {"all": True}, "bundles": bundles, "program": program} | fields
    return json_format.ParseDict(document, policy_pb2.Policy())


@pytest.fixture
def version(client: Client) -> Iterator[int]:
    """A version that no policy has had; what is applied in a test is emptied behind it."""
    first = 1 + max((policy.version for policy in client.policies()), default=0)
    yield first
    client.apply(policy_pb2.Policy(name="low", version=first + 100))


def test_policy_binds_the_next_call(client: Client, server: Running, version: int) -> None:
    free = client.complete("The cell", max_tokens=4, temperature=0.0)
    summary = client.apply(
        message(client, version=version, forbidden_fields=["sampling.n"], rights={"read_guards": True})
    )
    assert (summary.name, summary.version) == ("low", version)
    bound = client.complete("The cell", max_tokens=4, temperature=0.0)
    edits = bound.choices[0].attestation.edits if bound.choices[0].attestation else ()
    assert [(edit.origin, edit.site) for edit in edits] == [("policy", SITE)]
    assert all(edit.tokens_touched for edit in edits)
    assert [p.withheld for p in (bound.choices[0].attestation.policies if bound.choices[0].attestation else ())] == [
        False
    ]
    assert not (free.choices[0].attestation and free.choices[0].attestation.edits)
    with pytest.raises(RudderError) as caught:
        client.complete("The cell", n=2)
    assert (caught.value.reason, caught.value.violations[0].field) == ("POLICY_FORBIDS", "sampling.n")
    statements = list(client.explain().statements)
    assert statements[0] == f"Policy 'low', version {version}, binds this caller."
    assert "Policy 'low' forbids the field sampling.n." in statements
    assert server.metric("rudder_policy", policy="low", version=str(version), mode="enforce") == 1
    assert server.metric("rudder_edits_applied_tokens_total", policy="low", origin="policy") > 0
    assert client.policy("low").forbidden_fields == ["sampling.n"]


async def test_invalid_policy_is_refused_by_its_fields(client: Client, aclient: AsyncClient, version: int) -> None:
    bad = message(client, version=version, forbidden_fields=["sampling.x"], max_displacement=-1)
    fields = ["forbidden_fields[0]", "max_displacement"]
    assert [problem.field for problem in await aclient.validate(bad)] == fields
    with pytest.raises(RudderError) as caught:
        await aclient.apply(bad)
    assert (caught.value.reason, [violation.field for violation in caught.value.violations]) == (
        "POLICY_INVALID",
        fields,
    )
    assert "low" not in {policy.name for policy in await aclient.policies() if policy.version == version}
    assert (await aclient.explain("nobody")).statements[0]
    with pytest.raises(RudderError) as caught:
        await aclient.policy("none")
    assert caught.value.reason == "POLICY_UNKNOWN"
