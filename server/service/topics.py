"""A topic of a request: the concept that it names, as a program on the concept's rows, and what it stood for."""

from collections.abc import Mapping

from rudder.sae_models import concepts
from rudder.sae_models.concepts import Candidate, Concept, Concepts
from rudder.server.service.errors import Refusal, invalid
from rudder.v1 import inference_pb2, program_pb2

FIELD = "steering.topic"


def resolve_topic(message: inference_pb2.TopicSteering, served: Mapping[str, Concepts]) -> inference_pb2.ResolvedTopic:
    """Return what a topic stands for.

    Raises Refusal: TOPIC_UNKNOWN names the nearest concepts, TOPIC_INERT the reason why the concept's rows are not
    used, or not at this amount.
    """
    owner = {id(concept): content for content in served.values() for concept in content.concepts}
    known = [concept for content in served.values() for concept in content.concepts]
    found = concepts.find(known, message.topic)
    if not found:
        raise unknown(message.topic, known)
    concept, chosen = found[0], found[0].chosen
    if chosen.inert:
        raise invalid(f"{FIELD}.topic", f"{concept.name}: {chosen.inert}", "TOPIC_INERT")
    dose, content = dose_of(message, concept), owner[id(concept)]
    resolved = inference_pb2.ResolvedTopic(
        concept=concept.name,
        bundle=content.bundle,
        site=content.site,
        strength=dose / chosen.s_max,
        dose=dose,
        kl=concepts.kl_at(chosen.curve, dose),
        chosen=candidate_message(chosen, dose),
    )
    for second in concept.candidates[1:2]:
        resolved.runner_up.CopyFrom(candidate_message(second, resolved.strength * second.s_max))
    return resolved


def unknown(topic: str, known: list[Concept]) -> Refusal:
    """Return the refusal of a topic that no concept has."""
    if not known:
        return invalid(f"{FIELD}.topic", "no bundle of this server has concepts", "TOPIC_UNKNOWN")
    near = ", ".join(concepts.nearest(known, topic))
    return invalid(f"{FIELD}.topic", f"no concept {topic!r}; nearest of {len(known)}: {near}", "TOPIC_UNKNOWN")


def dose_of(message: inference_pb2.TopicSteering, concept: Concept) -> float:
    """Return the dose that a request asks for, as a share of ||x||."""
    chosen = concept.chosen
    if message.WhichOneof("amount") != "kl":
        return (message.strength if message.HasField("strength") else 1.0) * chosen.s_max
    dose = concepts.dose_for_kl(chosen, message.kl)
    if dose is None:
        most = concepts.kl_at(chosen.curve, chosen.s_max)
        problem = f"{concept.name} diverges by {most:.3g} nats per token at strength 1, {message.kl:g} is beyond it"
        raise invalid(f"{FIELD}.kl", problem, "TOPIC_INERT")
    return dose


def candidate_message(candidate: Candidate, dose: float) -> inference_pb2.TopicCandidate:
    """Convert a candidate at a dose."""
    rows = (
        inference_pb2.TopicRow(
            index=row.index,
            label=row.label,
            dose=dose * row.weight,
            output_score=row.output_score,
            input_score=row.input_score,
        )
        for row in candidate.rows
    )
    return inference_pb2.TopicCandidate(kind=candidate.kind, rows=rows, score=candidate.response.value)


def program_of(topic: inference_pb2.ResolvedTopic) -> program_pb2.Program:
    """Return the program that a topic stands for: its rows added, in residual norms, at every token."""
    edits = [
        program_pb2.Edit(
            row=program_pb2.Row(feature=program_pb2.Feature(bundle=topic.bundle, index=row.index)),
            add=row.dose,
            unit=program_pb2.UNIT_RESIDUAL_NORM,
        )
        for row in topic.chosen.rows
    ]
    return program_pb2.Program(name=topic.concept, sites=[program_pb2.SiteEdits(site=topic.site, edits=edits)])
