"""Steering by topic on the shipped bundle: what runs, what is attested, and what is refused."""

import pytest

from rudder.sae_models import PRETRAINED, concepts
from rudder.server.cli import main
from rudder_client import Client, Report, RudderError, Topic
from tests.e2e.conftest import Running

pytestmark = pytest.mark.e2e
BUNDLE = PRETRAINED / "textbook-lm-layers.2"
PROMPT = "For many years, people"


def test_every_shipped_concept_steers_by_its_calibrated_rows(client: Client) -> None:
    shipped = concepts.read(BUNDLE / concepts.FILE).concepts
    assert len(shipped) >= 5
    for concept in (each for each in shipped if not each.chosen.inert):
        attestation = (
            client.complete(PROMPT, steer=Topic(concept.name, strength=0.5), max_tokens=4).choices[0].attestation
        )
        assert attestation
        assert attestation.topic
        chosen = concept.chosen
        assert attestation.topic.dose == pytest.approx(chosen.s_max / 2)
        assert [row.index for row in attestation.topic.chosen.rows] == [row.index for row in chosen.rows]
        # All tokens that went through the model but BOS, counted in the worker.
        touched = {edit.tokens_touched for edit in attestation.edits}
        assert touched == {attestation.tokens_seen - 1}
        assert len(attestation.edits) == len(chosen.rows)


def test_strength_and_divergence_are_amounts_of_one_dose(client: Client) -> None:
    concept = next(each for each in concepts.read(BUNDLE / concepts.FILE).concepts if not each.chosen.inert)
    plain = client.complete(PROMPT, max_tokens=24, temperature=0).text
    assert client.complete(PROMPT, steer=Topic(concept.name), max_tokens=24, temperature=0).text != plain
    kl = concepts.kl_at(concept.chosen.curve, concept.chosen.s_max) / 2
    attestation = client.inspect(PROMPT, steer=Topic(concept.name, kl=kl), report=Report(top_k=1)).attestation
    assert attestation.topic
    assert attestation.topic.kl == pytest.approx(kl)
    assert 0 < attestation.topic.strength < 1


def test_unknown_topics_are_refused_with_the_nearest(client: Client) -> None:
    with pytest.raises(RudderError, match="nearest") as refused:
        client.complete("x", steer=Topic("zoology"), max_tokens=1)
    assert (refused.value.reason, refused.value.code) == ("TOPIC_UNKNOWN", "NOT_FOUND")


def test_the_command_line_steers_by_topic(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    name = next(c.name for c in concepts.read(BUNDLE / concepts.FILE).concepts if not c.chosen.inert)
    arguments = ["generate", PROMPT, "--topic", name, "--strength", "0.25", "--max-tokens", "4"]
    assert main([*arguments, "--address", server.address]) == 0
    assert f"topic {name}: strength 0.25" in capsys.readouterr().err
