"""Certificates on a real engine: the same engine passes, a planted flip degrades, another configuration is stale."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from rudder.sae_models.errors import UserError
from rudder.server.engine.engine import Engine
from rudder.server.program.named import read_policy
from rudder.server.safety import certificate as certificates
from rudder.server.safety.certify import record, rerun
from rudder.server.safety.policy import Policy, compile_policy
from rudder.server.safety.problems import PolicyInvalid
from rudder.server.safety.store import PolicyStore
from rudder.v1 import policy_pb2

SITE = "layers.2.resid_post"
TEXTS = [
    {"text": "The bacterium divides by binary fission, and its cell wall"},
    {"text": "The court of appeals held that the statute"},
    {"text": "An antibiotic inhibits the synthesis of the cell wall of bacteria."},
    {"text": "What is demand?", "answer": "It is how much of a good consumers want at each price."},
    {"text": "Supply and demand set the price of a good in a market."},
    {"text": "A virus has a capsid; bacteria and archaea are prokaryotes."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Path:
    """A folder with a policy: a program whose gate opens on some of the texts, and guards that hold in some."""
    made = tmp_path_factory.mktemp("policies")
    (name,) = engine.bundles
    index = trigger(engine)
    latent = {"feature": {"index": index, "bundle": name}}
    guard = {"name": "topic", "score": {"terms": [{"site": SITE, "row": latent, "weight": 1.0}]}, "level": 0.0}
    policy = {
        "name": "forget", "version": 1, "binds": {"all": True}, "bundles": {name: engine.bundles[name].sha256},
        "program": {
            "gate": {"site": SITE, "any_of": [{"row": latent, "above": 0.0}]},
            "sites": [{"site": SITE, "edits": [{"row": latent, "set": 0.0}]}],
        },
        "guards": [guard | {"action": "GUARD_ACTION_STOP"}, guard | {
            "name": "answer", "action": "GUARD_ACTION_COUNT", "phase": "PHASE_GENERATED", "level": -1.0,
        }],
    }  # fmt: skip
    (made / "forget.yaml").write_text(yaml.safe_dump(policy))
    (made / "texts.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    return made


def trigger(engine: Engine) -> int:
    """Return the latent of the shipped bundle whose label names bacteria, or the most common one."""
    (bundle,) = engine.bundles.values()
    latents = bundle.catalogue.page(-1, bundle.manifest.latents)
    return next((latent.index for latent in latents if "bacteri" in latent.label.lower()), latents[0].index)


def removal(policy: Policy) -> policy_pb2.Policy:
    """What takes a policy out of force."""
    return policy_pb2.Policy(name=policy.name, version=policy.version + 1, removed=True)


@pytest.fixture(scope="module")
def policy(folder: Path, engine: Engine) -> Policy:
    return compile_policy(read_policy(folder / "forget.yaml"), engine.registry, folder)


@pytest.fixture
async def recorded(folder: Path, policy: Policy, engine: Engine) -> certificates.Evaluation:
    return await record(engine, policy, folder, certificates.read_texts(folder / "texts.jsonl"))


async def test_same_engine_passes_and_its_policy_may_be_put_in_force(
    recorded: certificates.Evaluation, folder: Path, policy: Policy, engine: Engine
) -> None:
    acts = [case.expected for case in recorded.cases]
    assert [act.guards["answer"] is not None for act in acts] == [bool(text.get("answer")) for text in TEXTS]
    held = [act.guards["topic"] is not None for act in acts]
    assert held == [bool(sum(act.edits.values())) for act in acts] == [bool(sum(act.gates.values())) for act in acts]
    made = await rerun(engine, policy, folder, 0.0)
    assert (made.result, {part.flips for part in made.parts}) == ("PASS", {0})
    store = PolicyStore(engine, folder)
    assert store.certificate(policy.message) == ("PASS", "")
    assert await store.apply(policy.message, "test")
    await store.apply(removal(policy), "test")


async def test_planted_flip_degrades_and_keeps_the_policy_out(
    recorded: certificates.Evaluation, folder: Path, policy: Policy, engine: Engine
) -> None:
    first = recorded.cases[0]
    guards = {name: 3 if position is None else None for name, position in first.expected.guards.items()}
    planted = msgspec.structs.replace(first, expected=msgspec.structs.replace(first.expected, guards=guards))
    path = certificates.evaluation_path(folder, "forget")
    certificates.write_evaluation(path, msgspec.structs.replace(recorded, cases=(planted, *recorded.cases[1:])))
    made = await rerun(engine, policy, folder, 0.01)
    assert {part.name: part.flipped for part in made.parts if part.flips} == {
        "guard topic": (first.sha256,), "guard answer": (first.sha256,),
    }  # fmt: skip
    with pytest.raises(PolicyInvalid, match="certificate: DEGRADED: acts otherwise than recorded: guard topic: 1 of 6"):
        await PolicyStore(engine, folder).apply(policy.message, "test")


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"engine": {"dtype": "bfloat16"}}, "STALE: since its certificate of .* dtype was bfloat16, is float32"),
        ({"policy": "other"}, "STALE: .*: the policy's content; run `rudder policy certify FILE`"),
        ({"bundles": {}}, "STALE: .*: the bundles"),
    ],
)
async def test_certificate_of_another_configuration_is_stale(
    folder: Path, policy: Policy, engine: Engine, change: Any, problem: str
) -> None:
    made = await rerun(engine, policy, folder, 0.0)
    before = msgspec.to_builtins(made.fingerprint)
    other = msgspec.convert({**before, **change}, certificates.Fingerprint)
    if "engine" in change:
        other = msgspec.structs.replace(other, engine={**made.fingerprint.engine, **change["engine"]})
    certificates.write_certificate(folder, msgspec.structs.replace(made, fingerprint=other))
    with pytest.raises(PolicyInvalid, match=problem):
        await PolicyStore(engine, folder).apply(policy.message, "test")
    store = PolicyStore(engine, folder, allow_uncertified=True)
    await store.apply(policy.message, "test")
    await store.apply(removal(policy), "test")


async def test_policy_without_a_certificate_is_refused(tmp_path: Path, policy: Policy, engine: Engine) -> None:
    with pytest.raises(PolicyInvalid, match="certificate: NONE: it has no certificate; run `rudder policy certify"):
        await PolicyStore(engine, tmp_path).apply(policy.message, "test")


async def test_evaluation_of_another_content_is_not_rerun(
    recorded: certificates.Evaluation, folder: Path, policy: Policy, engine: Engine
) -> None:
    other = msgspec.structs.replace(recorded.fingerprint, policy="other")
    path = certificates.evaluation_path(folder, "forget")
    certificates.write_evaluation(path, msgspec.structs.replace(recorded, fingerprint=other))
    with pytest.raises(UserError, match="STALE: it was recorded with another program, guards or bundles"):
        await rerun(engine, policy, folder, 0.0)


async def test_texts_on_which_nothing_happens_make_no_evaluation(folder: Path, policy: Policy, engine: Engine) -> None:
    with pytest.raises(UserError, match="guard topic acts on none of the 1 texts"):
        await record(engine, policy, folder, [certificates.Text(text=TEXTS[1]["text"])])


async def test_text_that_is_too_long_is_named(folder: Path, policy: Policy, engine: Engine) -> None:
    with pytest.raises(UserError, match=r"text 1 has \d+ tokens: 1 to 511 are possible"):
        await record(engine, policy, folder, [certificates.Text(text="cell " * 600)])
