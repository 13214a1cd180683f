"""A topic becomes a program on the rows of its concept, obeys policies, and is refused by name."""

from typing import Any

import pytest

from rudder.server.caller import ANONYMOUS
from rudder.server.program.compile import compile_program
from rudder.server.safety.binding import Binding
from rudder.server.service.attestation import attestation_of
from rudder.server.service.errors import Refusal
from rudder.server.service.prepare import prepare
from rudder.server.service.record import ChoiceRecord
from rudder.server.service.topics import program_of, resolve_topic
from rudder.v1 import inference_pb2
from tests.unit.policies import latent, policy
from tests.unit.programs import OTHER, REGISTRY, SITE
from tests.unit.reference import BUNDLE
from tests.unit.server.service.test_prepare import KINDS, UP, refused, request_of, serving_of
from tests.unit.topics import SERVED


def resolve(**fields: Any) -> inference_pb2.ResolvedTopic:
    return resolve_topic(inference_pb2.TopicSteering(**fields), SERVED)


def test_strength_is_a_share_of_the_calibrated_dose() -> None:
    whole, half = resolve(topic="astronomy"), resolve(topic="astronomy", strength=0.5)
    assert (whole.strength, whole.dose, half.strength, half.dose) == (1, 0.4, 0.5, 0.2)
    assert (whole.kl, half.kl) == (0.5, 0.1)
    assert [(row.index, row.dose) for row in half.chosen.rows] == [(2, 0.1), (3, -0.05)]
    assert half.chosen.rows[0].label == "star, planet"
    assert half.chosen.rows[0].output_score == 0.3
    assert not half.chosen.rows[1].HasField("output_score")


def test_the_runner_up_is_named_at_the_same_strength() -> None:
    runner_up = resolve(topic="astronomy", strength=0.5).runner_up
    assert (runner_up.kind, runner_up.score, runner_up.rows[0].dose) == ("output", 0.5, 0.1)
    assert not resolve(topic="psychology").HasField("runner_up")


def test_a_divergence_is_reached_by_its_dose() -> None:
    resolved = resolve(topic="astronomy", kl=0.3)
    assert (resolved.dose, resolved.strength, resolved.kl) == pytest.approx((0.3, 0.75, 0.3))


@pytest.mark.parametrize(
    ("fields", "reason", "field", "text"),
    [
        ({"topic": "astronomie"}, "TOPIC_UNKNOWN", "steering.topic.topic", "nearest of 3: astronomy"),
        ({"topic": "chemistry"}, "TOPIC_INERT", "steering.topic.topic", "random directions"),
        ({"topic": "astronomy", "kl": 0.6}, "TOPIC_INERT", "steering.topic.kl", "0.5 nats"),
    ],
)
def test_unknown_and_inert_topics_are_refused(fields: Any, reason: str, field: str, text: str) -> None:
    with pytest.raises(Refusal, match=text) as refusal:
        resolve(**fields)
    assert (refusal.value.reason, refusal.value.violations[0].field) == (reason, field)


def test_a_server_without_concepts_says_so() -> None:
    with pytest.raises(Refusal, match="no bundle of this server has concepts"):
        resolve_topic(inference_pb2.TopicSteering(topic="x"), {})


def test_the_displacement_does_not_depend_on_the_norm_of_the_decoder() -> None:
    (site,) = compile_program(program_of(resolve(topic="astronomy")), REGISTRY).sites
    # Feature 2 has a decoder of norm 2.
    assert [(edit.shift, edit.relative) for edit in site.edits] == [(0.1, True), (-0.1, True)]
    assert [(row.bundle, row.latent) for row in site.rows] == [(BUNDLE, 2), (BUNDLE, 3)]


def serving(**kwargs: Any) -> Any:
    built = serving_of(**kwargs)
    built.engine.concepts = SERVED
    return built


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_every_method_runs_the_program_of_a_topic_and_attests_it(kind: Any) -> None:
    job = await prepare(serving(), ANONYMOUS, request_of(kind, steering={"topic": {"topic": "night sky"}}))
    expected = resolve(topic="astronomy")
    assert job.program_digest == compile_program(program_of(expected), REGISTRY).digest
    fields = {"program_digest": "", "policy_digest": "", "request_id": "", "topic": job.topic, "policies": ()}
    record: Any = type("Record", (), fields)
    assert attestation_of(record, ChoiceRecord(), "e1").topic == expected


async def test_other_requests_attest_no_topic() -> None:
    assert (await prepare(serving(), ANONYMOUS, request_of(steering={"name": "ok"}))).topic is None


def moving(site: str) -> dict[str, Any]:
    """A program that moves the residuals of a site."""
    return {"sites": [{"site": site, "edits": [UP]}]}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_a_topic_obeys_the_policy(kind: Any) -> None:
    request = request_of(kind, steering={"topic": {"topic": "astronomy"}})
    locked = Binding((policy(locked=[{"site": SITE, "row": latent(3)}]),))
    assert await refused(serving(), request, locked) == ("ROW_LOCKED", "steering.topic.sites[0].edits[1].row")
    before = Binding((policy(program=moving("layers.0.resid_post")),))
    assert await refused(serving(), request, before) == ("POLICY_FORBIDS", "steering.topic.sites[0].site")
    elsewhere = Binding((policy(program=moving(OTHER)),))
    assert (await prepare(serving(), ANONYMOUS, request, elsewhere)).calls


@pytest.mark.parametrize(
    ("topic", "field"),
    [
        ({"topic": ""}, "topic"),
        ({"topic": "x" * 129}, "topic"),
        ({"topic": "astronomy", "strength": 0}, "strength"),
        ({"topic": "astronomy", "strength": -1}, "strength"),
        ({"topic": "astronomy", "strength": 1.01}, "strength"),
        ({"topic": "astronomy", "strength": "NaN"}, "strength"),
        ({"topic": "astronomy", "kl": 0}, "kl"),
    ],
)
async def test_amounts_and_topics_are_bounded(topic: Any, field: str) -> None:
    request = request_of(steering={"topic": topic})
    assert await refused(serving(), request) == ("FIELD_INVALID", f"steering.topic.{field}")
