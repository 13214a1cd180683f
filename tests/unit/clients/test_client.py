"""The client: builders of requests and readers of responses, against the messages of the contract; README's program."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from google.protobuf import json_format

import rudder_client
from rudder.v1 import catalogue_pb2, inference_pb2, program_pb2
from rudder_client import Feature, Probe, Program, Report, Structured, Topic, TopicCandidate, TopicRow, Vector
from rudder_client.channel import seconds
from rudder_client.requests import generate_request, prompt_message, report_message, sampling_message, steering_message
from rudder_client.results import Names, attestation_of, chunk_of, completion_of, inspection_of

SITE = "layers.2.resid_post"


def test_program_message_has_all_edits_in_order() -> None:
    program = (
        Program("calm", "less of it")
        .at(SITE, restore_norm=True, max_displacement=0.5)
        .clamp(feature=12, to=-2, unit="residual")
        .add(vector=Vector([1.0, 2.0], "truth"), by=4, phase="generated")
        .scale(Feature(3, "other"), by=0.5, when_above=1.5)
        .at("layers.4.mlp_out")
        .blend(0.25)
    )
    assert json_format.MessageToDict(program.message, preserving_proto_field_name=True) == {
        "name": "calm",
        "description": "less of it",
        "sites": [
            {
                "site": SITE,
                "restore_norm": True,
                "max_displacement": 0.5,
                "edits": [
                    {
                        "row": {"feature": {"index": 12}},
                        "clamp": -2.0,
                        "unit": "UNIT_RESIDUAL_NORM",
                        "phase": "PHASE_BOTH",
                    },
                    {
                        "row": {"vector": {"name": "truth", "values": [1.0, 2.0]}},
                        "add": 4.0,
                        "unit": "UNIT_ABSOLUTE",
                        "phase": "PHASE_GENERATED",
                    },
                    {
                        "row": {"feature": {"bundle": "other", "index": 3}},
                        "scale": 0.5,
                        "unit": "UNIT_ABSOLUTE",
                        "when_above": 1.5,
                        "phase": "PHASE_BOTH",
                    },
                ],
            },
            {"site": "layers.4.mlp_out", "blend": {"weight": 0.25, "phase": "PHASE_BOTH"}},
        ],
    }


@pytest.mark.parametrize("operation", ["set", "clamp", "cap", "floor", "add", "scale", "ablate"])
def test_every_operation_of_the_contract_has_a_method(operation: str) -> None:
    argument = () if operation == "ablate" else (1.5,)
    program = getattr(Program().at(SITE), operation)(7, *argument)
    (edit,) = program.message.sites[0].edits
    assert edit.WhichOneof("operation") == operation
    assert edit.row.feature.index == 7
    oneof = program_pb2.Edit.DESCRIPTOR.oneofs_by_name["operation"]
    assert operation in [field.name for field in oneof.fields]
    assert len(oneof.fields) == 7


def test_a_topic_has_a_strength_or_a_divergence() -> None:
    assert steering_message(Topic("a")) == inference_pb2.Steering(topic={"topic": "a"})
    assert steering_message(Topic("a", strength=0.5)) == inference_pb2.Steering(topic={"topic": "a", "strength": 0.5})
    assert steering_message(Topic("a", kl=0.5)) == inference_pb2.Steering(topic={"topic": "a", "kl": 0.5})
    with pytest.raises(ValueError, match="not both"):
        steering_message(Topic("a", strength=0.5, kl=0.5))


def test_an_attestation_says_what_a_topic_stood_for() -> None:
    row = {"index": 3, "label": "star", "dose": 0.25, "output_score": 0.5}
    topic = {"concept": "astronomy", "strength": 0.5, "chosen": {"kind": "group", "rows": [row], "score": 0.75}}
    read = attestation_of(inference_pb2.Attestation(topic=topic)).topic
    assert read
    assert (read.concept, read.strength, read.runner_up) == ("astronomy", 0.5, None)
    assert read.chosen == TopicCandidate("group", (TopicRow(3, "star", 0.25, 0.5, None),), 0.75)
    assert attestation_of(inference_pb2.Attestation()).topic is None


def test_add_takes_its_former_parameter() -> None:
    assert Program().at(SITE).add(7, value=1.5).message == Program().at(SITE).add(feature=7, by=1.5).message


def test_set_by_keywords() -> None:
    (edit,) = Program().at(SITE).set(feature=7, to=1.5).message.sites[0].edits
    assert (edit.row.feature.index, edit.set) == (7, 1.5)


def test_the_first_program_of_the_readme_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = MagicMock()
    client.__enter__.return_value = client
    client.search.return_value = [catalogue_pb2.FeatureSummary(index=12, site=SITE, label="stars")]
    client.generate.return_value = [SimpleNamespace(text=" is full")]
    star = SimpleNamespace(feature=SimpleNamespace(label="stars"), value=1.26)
    client.inspect.return_value = SimpleNamespace(tokens=[SimpleNamespace(text="Viruses", activations=[star])])
    monkeypatch.setattr(rudder_client, "Client", lambda _: client)
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    block = re.search(r"## A first program by hand.*?```python\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    exec(block[1], {})
    assert capsys.readouterr().out == " is full\nViruses [('stars', 1.3)]\n"
    (edit,) = client.generate.call_args.kwargs["steer"].message.sites[0].edits
    assert (edit.row.feature.index, edit.add, edit.unit) == (12, 1.0, program_pb2.UNIT_MAX_ACTIVATION)


def test_gates() -> None:
    gated = Program().at(SITE).gate(7, above=0.5).gate(Probe([1.0], 0.25, "p"), above=1).ablate(3)
    assert [trigger.above for trigger in gated.message.gate.any_of] == [0.5, 1.0]
    assert gated.message.gate.any_of[1].row.probe.name == "p"
    sequence = Program().at(SITE).gate_sequence(7, 0.5, share_above=2.0, latch=True, min_tokens=3).message.gate.sequence
    assert (sequence.share.above, sequence.level, sequence.latch, sequence.min_tokens) == (2.0, 0.5, True, 3)
    for name, keyword in (("moving_average", 0.1), ("window", 5), ("cusum", 0.2)):
        argument = {"cusum": "cusum_drift"}.get(name, name)
        gated_by = Program().at(SITE).gate_sequence(7, 0.5, **{argument: keyword})  # type: ignore[arg-type]
        assert gated_by.message.gate.sequence.WhichOneof("statistic") == name
    with pytest.raises(ValueError, match="one gate"):
        gated.at("layers.3.mlp_out").gate(1)


def test_extending_a_program_leaves_the_original_unchanged() -> None:
    base = Program().at(SITE).ablate(1)
    left, right = base.ablate(2), base.ablate(3)
    assert [len(p.message.sites[0].edits) for p in (base, left, right)] == [1, 2, 2]


def test_missing_site_or_row_raises() -> None:
    with pytest.raises(ValueError, match="at"):
        Program().ablate(1)
    with pytest.raises(ValueError, match="feature or a vector"):
        Program().at(SITE).add(by=1.0)
    with pytest.raises(ValueError, match="feature or a vector"):
        Program().at(SITE).add(feature=1, vector=[1.0])


def test_prompts() -> None:
    assert prompt_message("x").text == "x"
    assert list(prompt_message([1, 2]).token_ids.ids) == [1, 2]
    chat = prompt_message([{"role": "user", "content": "hi"}]).chat
    assert [(m.role, m.content) for m in chat.messages] == [("user", "hi")]


def test_steering() -> None:
    assert steering_message(None) is None
    named, inline = steering_message("calm"), steering_message(Program().at(SITE).ablate(1))
    assert named is not None
    assert named.name == "calm"
    assert inline is not None
    assert inline.program.sites[0].site == SITE


def test_reports() -> None:
    report = report_message(Report(features={SITE: [4, Probe([1.0], name="p")]}, top_k=2, tokens=False, pooled=True))
    assert report is not None
    assert [f.row.WhichOneof("row") for f in report.features] == ["feature", "probe"]
    assert (report.top_k, report.no_tokens, report.pooled, report.prompt) == (2, True, True, False)


def test_sampling_is_passed_by_name() -> None:
    sampling = {"max_tokens": 5, "stop": ["a"], "logit_bias": {3: 1.0}, "n": 2}
    request = generate_request("x", None, None, "s", 4, sampling)  # type: ignore[arg-type]
    assert (request.sampling.max_tokens, list(request.sampling.stop), request.sampling.n) == (5, ["a"], 2)
    assert (request.cache_salt, request.stream_interval, dict(request.sampling.logit_bias)) == ("s", 4, {3: 1.0})
    with pytest.raises(ValueError, match="max_tokenz"):
        generate_request("x", None, None, "", 0, {"max_tokenz": 5})  # type: ignore[typeddict-unknown-key]


def test_chunks_join_columns_with_names() -> None:
    names = Names()
    names.learn([inference_pb2.FeatureInfo(site=SITE, bundle="b", index=9, label="nine")])
    names.learn([inference_pb2.FeatureInfo(site=SITE, bundle="b", index=4, label="four")])
    chunk = chunk_of(
        inference_pb2.ChoiceDelta(
            index=1,
            text="t",
            token_ids=[5],
            activations=inference_pb2.FeatureColumns(positions=[3, 3], features=[1, 0], activations=[0.5, 2.0]),
            logprobs=inference_pb2.Logprobs(chosen=[-1.0], width=2, alternative_ids=[5, 6], alternatives=[-1.0, -2.0]),
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            pooled=[inference_pb2.PooledFeature(feature=1, sum=1.0), inference_pb2.PooledFeature(feature=0, sum=2.0)],
        ),
        names,
    )
    assert [(a.position, a.feature.label, a.value) for a in chunk.activations] == [(3, "four", 0.5), (3, "nine", 2.0)]
    assert chunk.logprobs is not None
    assert chunk.logprobs.alternatives == (((5, -1.0), (6, -2.0)),)
    assert chunk.finish_reason == "stop"
    assert [p.feature.index for p in chunk.pooled] == [9, 4]
    assert chunk.usage is None


def test_second_at_keeps_what_the_first_set() -> None:
    program = Program().at(SITE, restore_norm=True, max_displacement=0.5).ablate(1).at("layers.3.mlp_out").ablate(2)
    (edits, _) = program.at(SITE).ablate(3).message.sites
    assert (edits.restore_norm, edits.max_displacement, len(edits.edits)) == (True, 0.5, 2)
    (edits, _) = program.at(SITE, max_displacement=0.25).message.sites
    assert (edits.restore_norm, edits.max_displacement) == (True, 0.25)
    (edits, _) = program.at(SITE, restore_norm=False).message.sites
    assert (edits.restore_norm, edits.max_displacement) == (False, 0.5)


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda p: p.gate_sequence(1, 0.5), "give one of share_above, .* not 0"),
        (lambda p: p.gate_sequence(1, 0.5, share_above=1.0, window=3), "give one of share_above, .* not 2"),
        (lambda p: p.gate_sequence(1, 0.5, window=3, cusum_drift=0.0, moving_average=0.1), "not 3"),
        (lambda p: p.gate_sequence(1, 0.5, window=3).gate_sequence(2, 0.5, window=3), "one condition on the sequence"),
        (lambda p: p.blend(0.5).blend(0.25), "layers.2.resid_post has one already"),
        (lambda p: p.blend(0.5, vector=[1.0], bundle="b"), "a vector or a bundle"),
        (lambda p: p.add(1, by=2.0, value=3.0), "former name"),
        (lambda p: p.add(1, by=2.0, unit="metres"), "unit: 'metres' is none of absolute, max_activation, residual"),
        (lambda p: p.add(1, by=2.0, phase="later"), "phase: 'later' is none of both, prompt, generated"),
    ],
    ids=[
        "no-statistic",
        "two-statistics",
        "three-statistics",
        "two-sequences",
        "two-blends",
        "two-means",
        "two-values",
        "unknown-unit",
        "unknown-phase",
    ],
)
def test_nothing_said_twice_is_dropped_silently(build: Callable[[Program], Program], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        build(Program().at(SITE))


@pytest.mark.parametrize(
    "prompt",
    [
        [1, {"role": "user", "content": "hi"}],
        [{"role": "user", "content": "hi"}, 1],
        ["text"],
        [1, "text"],
        [1.0],
        [True],
        [None],
        b"text",
        {"role": "user", "content": "hi"},
        [{"role": "user"}],
        [{"role": "user", "content": "hi", "name": "x"}],
        [{}],
        [{"role": "user", "content": None}],
    ],
    ids=str,
)
def test_prompt_of_another_kind_is_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match="prompt: "):
        prompt_message(prompt)


@pytest.mark.parametrize(
    "sampling",
    [{"stop": "ab"}, {"bad_words": "ab"}, {"structured": Structured(choice="ab")}],
    ids=["stop", "bad", "choice"],
)
def test_one_text_in_place_of_several_is_refused(sampling: Any) -> None:
    with pytest.raises(ValueError, match="give a list of texts"):
        sampling_message(sampling)


def test_timeout_of_0_is_no_missing_timeout() -> None:
    assert (seconds(None, 5.0), seconds(0, 5.0), seconds(None, None)) == (5.0, 0, None)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16, np.uint64])
def test_numpy_integers_are_token_ids_and_features(kind: Any) -> None:
    assert list(prompt_message([kind(1), 2]).token_ids.ids) == [1, 2]
    assert list(prompt_message(np.array([1, 2], kind)).token_ids.ids) == [1, 2]  # type: ignore[arg-type]
    assert Program().at(SITE).ablate(kind(7)).message == Program().at(SITE).ablate(7).message
    assert Program().at(SITE).gate(kind(7), above=kind(1)).message == Program().at(SITE).gate(7, above=1).message
    windowed = [Program().at(SITE).gate_sequence(i(7), 0.5, window=i(4), min_tokens=i(2)).message for i in (kind, int)]
    assert windowed[0] == windowed[1]
    sampling = {
        "max_tokens": kind(5),
        "seed": kind(3),
        "stop_token_ids": np.array([3], kind),
        "logit_bias": {kind(3): 1},
    }
    message = generate_request("x", None, Report({SITE: [kind(4)]}, top_k=kind(2)), "", kind(1), sampling)  # type: ignore[arg-type]
    assert (message.sampling.max_tokens, message.sampling.seed, message.report.top_k) == (5, 3, 2)
    assert dict(message.sampling.logit_bias) == {3: 1.0}


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numpy_numbers_are_values_and_vectors(kind: Any) -> None:
    vector, plain = np.array([0.5, 2.0], kind), [0.5, 2.0]
    for array in (vector, vector[:1], np.zeros(2, kind)):
        expected = Program().at(SITE).add(vector=array.tolist(), by=0.5)
        assert Program().at(SITE).add(vector=array, by=kind(0.5)).message == expected.message
    assert (
        Program().at(SITE).blend(kind(0.5), vector=vector).message
        == Program().at(SITE).blend(0.5, vector=plain).message
    )
    probes = [Program().at(SITE).gate(Probe(w, b), above=b).message for w, b in ((vector, kind(0.5)), (plain, 0.5))]
    assert probes[0] == probes[1]
    sampling = {"temperature": kind(0.5), "logit_bias": {3: kind(1.5)}}
    message = generate_request("x", None, None, "", 0, sampling)  # type: ignore[arg-type]
    assert (message.sampling.temperature, dict(message.sampling.logit_bias)) == (0.5, {3: 1.5})


def test_completions_and_inspections() -> None:
    info = inference_pb2.FeatureInfo(site=SITE, index=9, label="nine")
    choice = inference_pb2.Choice(text="whole", finish_reason=inference_pb2.FINISH_REASON_LENGTH)
    done = completion_of(inference_pb2.CompleteResponse(request_id="r", features=[info], choices=[choice]))
    assert (done.request_id, done.text, done.choices[0].finish_reason) == ("r", "whole", "length")
    inspection = inspection_of(
        inference_pb2.InspectResponse(
            features=[info, info],
            token_ids=[1, 7],
            token_texts=["<bos>", "a"],
            activations=inference_pb2.FeatureColumns(positions=[1, 1], features=[0, 1], activations=[1.0, 3.0]),
        )
    )
    assert [a.value for a in inspection.tokens[1].activations] == [3.0, 1.0]
    assert inspection.tokens[0].activations == ()


def test_the_client_needs_grpc_and_protobuf_alone() -> None:
    script = (
        "import sys, rudder_client;"
        "roots = {name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names;"
        "print(*sorted(root for root in roots if not root.startswith('_')))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    # gRPC itself looks for its sister packages.
    others = {root for root in loaded if not root.startswith("grpc")}
    assert others <= {"google", "rudder", "rudder_client", "typing_extensions", "cython_runtime", "sitecustomize"}


def refused_delta(**score: float) -> inference_pb2.ChoiceDelta:
    """Return the last message of a choice that a guard refused."""
    verdict = inference_pb2.Verdict(rule="hazard", position=17, **score)
    applied = inference_pb2.AppliedPolicy(name="safe", version=3, digest="ab", verdicts=[verdict])
    return inference_pb2.ChoiceDelta(
        finish_reason=inference_pb2.FINISH_REASON_REFUSED,
        refusal=inference_pb2.PolicyRefusal(policy="safe", rule="hazard", text="[Not] here.", position=17, **score),
        attestation=inference_pb2.Attestation(policies=[applied]),
    )


@pytest.mark.parametrize(("sent", "score"), [({}, None), ({"score": 0.0}, 0.0)])
def test_refusal_says_policy_rule_text_and_position(sent: dict[str, float], score: float | None) -> None:
    chunk = chunk_of(refused_delta(**sent), Names())
    assert (chunk.finish_reason, chunk.text) == ("refused", "")
    assert chunk.refusal == rudder_client.Refusal("safe", "hazard", "[Not] here.", 17, score)
    assert chunk.attestation
    verdict = rudder_client.Verdict("hazard", 17, score)
    assert chunk.attestation.policies == (rudder_client.AppliedPolicy("safe", 3, "ab", False, (verdict,)),)
    assert rudder_client.Completion("r", (chunk,)).refusal == chunk.refusal
    assert chunk_of(inference_pb2.ChoiceDelta(), Names()).refusal is None
