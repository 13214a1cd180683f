"""Generation through a running server: text, steering, features, attestation, catalogue."""

import re
from typing import Any

import pytest

from rudder.v1 import inference_pb2, inference_pb2_grpc
from rudder_client import (
    Attestation,
    Chat,
    Chunk,
    Client,
    Feature,
    GateCount,
    Probe,
    Program,
    Report,
    RudderError,
    Structured,
    Vector,
)
from rudder_client.requests import generate_request

pytestmark = pytest.mark.e2e
SITE = "layers.2.resid_post"
PROMPT = "The cells of the body"


def push(feature: int, to: float = 40.0) -> Program:
    """Return a program strong enough to change the text."""
    return Program().at(SITE).set(feature=feature, to=to)


def joined(chunks: list[Chunk]) -> tuple[str, tuple[int, ...]]:
    return "".join(c.text for c in chunks), tuple(t for c in chunks for t in c.token_ids)


def test_generate_and_complete_give_the_same(client: Client) -> None:
    chunks = list(client.generate(PROMPT, max_tokens=30, temperature=0))
    whole = client.complete(PROMPT, max_tokens=30, temperature=0).choices[0]
    assert joined(chunks) == (whole.text, whole.token_ids)
    assert len(whole.token_ids) == 30
    assert len(chunks) > 5
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].finish_reason, whole.finish_reason) == ("length", "length")
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.generated_tokens == 30


def test_steering_changes_the_text_and_is_attested(client: Client) -> None:
    plain = client.complete(PROMPT, max_tokens=20, temperature=0)
    steered = client.complete(PROMPT, steer=push(7), max_tokens=20, temperature=0).choices[0]
    assert steered.text != plain.text
    assert steered.attestation is not None
    assert steered.usage is not None
    (edit,) = steered.attestation.edits
    assert (edit.origin, edit.site, edit.operation) == ("request", SITE, "set 40")
    assert edit.row == "feature 7 of textbook-lm-layers.2"
    # The last generated token does not go through the model; BOS is not edited.
    seen = steered.usage.prompt_tokens + 20 - 1
    assert (steered.attestation.tokens_seen, edit.tokens_touched) == (seen, seen - 1)
    assert client.complete(PROMPT, max_tokens=20, temperature=0).text == plain.text


def test_edit_that_did_not_run_is_attested_as_zero(client: Client) -> None:
    never = Program().at(SITE).clamp(feature=7, to=-40, when_above=1e6)
    choice = client.complete(PROMPT, steer=never, max_tokens=5).choices[0]
    assert choice.attestation is not None
    assert [edit.tokens_touched for edit in choice.attestation.edits] == [0]


def test_gates_are_attested_with_their_open_tokens_and_statistic(client: Client) -> None:
    scored = client.inspect(PROMPT, report=Report(top_k=1)).tokens[3].activations[0]
    feature, half = scored.feature.index, scored.value / 2
    program = Program().at(SITE).set(feature=(feature + 1) % 512, to=3.0)
    report = Report(features={SITE: [feature]}, prompt=True)

    def run(steer: Program) -> tuple[dict[int, float], Attestation]:
        completion = client.complete(PROMPT, steer=steer, report=report, max_tokens=20, temperature=0)
        (choice,) = completion.choices
        assert choice.attestation is not None
        assert choice.attestation.request_id == completion.request_id
        return {a.position: a.value for a in choice.activations if a.position > 0}, choice.attestation

    values, attestation = run(program.gate(feature, above=half))
    above = sum(value > half for value in values.values())
    assert above > 0
    assert attestation.gates == (GateCount("request", SITE, above, None),)
    assert attestation.edits[0].tokens_touched == above
    values, attestation = run(program.gate_sequence(feature, level=0.0, share_above=0.0))
    (gate,) = attestation.gates
    assert gate.statistic == pytest.approx(len(values) / (attestation.tokens_seen - 1))
    assert gate.open_tokens == attestation.edits[0].tokens_touched == attestation.tokens_seen - min(values)
    _, attestation = run(program)
    assert attestation.gates == ()


def test_vector_of_zero_strength_changes_nothing(client: Client) -> None:
    width = client.model().hidden_size
    nothing = Program().at(SITE).add(vector=Vector([1.0] * width, "ones"), value=0.0)
    plain = client.complete(PROMPT, max_tokens=15, temperature=0).text
    assert client.complete(PROMPT, steer=nothing, max_tokens=15, temperature=0).text == plain


def test_named_programs_run_by_name(client: Client) -> None:
    programs = client.programs()
    assert programs
    for program in programs:
        choice = client.complete(PROMPT, steer=program.name, max_tokens=3).choices[0]
        assert choice.attestation is not None
        assert choice.attestation.program_digest == program.digest


def test_request_id_and_digest_are_in_the_trailers(client: Client) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(client.channel)
    call = stub.Generate(generate_request(PROMPT, push(7), None, "", 0, {"max_tokens": 3}))
    messages = list(call)
    trailers = {key: value for key, value in call.trailing_metadata()}  # noqa: C416
    assert trailers["rudder-request-id"] == messages[0].request_id
    assert all(message.request_id == "" for message in messages[1:])
    assert trailers["rudder-program-digest"] == messages[-1].choices[0].attestation.program_digest


def test_choice_i_has_seed_plus_i(client: Client) -> None:
    three = client.complete(PROMPT, n=3, seed=11, max_tokens=12).choices
    assert [c.choice for c in three] == [0, 1, 2]
    assert len({c.text for c in three}) == 3
    for i, choice in enumerate(three):
        assert client.complete(PROMPT, seed=11 + i, max_tokens=12).text == choice.text
    chunks = list(client.generate(PROMPT, n=3, seed=11, max_tokens=12))
    for i, choice in enumerate(three):
        assert joined([c for c in chunks if c.choice == i])[0] == choice.text


def test_stop_string_or_token_ends_a_choice(client: Client) -> None:
    plain = client.complete(PROMPT, max_tokens=30, temperature=0).choices[0]
    word = plain.text.split()[3]
    stopped = client.complete(PROMPT, max_tokens=30, temperature=0, stop=[word]).choices[0]
    assert stopped.text == plain.text[: plain.text.index(word)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", word)
    included = client.complete(PROMPT, max_tokens=30, temperature=0, stop=[word], include_stop=True).choices[0]
    assert included.text == stopped.text + word
    token = plain.token_ids[4]
    by_token = client.complete(PROMPT, max_tokens=30, temperature=0, stop_token_ids=[token]).choices[0]
    assert by_token.token_ids == plain.token_ids[: plain.token_ids.index(token) + 1]
    assert by_token.stop_reason == str(token)


def test_logprobs_begin_with_the_greedy_choice(client: Client) -> None:
    choice = client.complete(PROMPT, max_tokens=6, temperature=0, logprobs=3).choices[0]
    assert choice.logprobs is not None
    assert len(choice.logprobs.chosen) == 6
    for token, chosen, row in zip(choice.token_ids, choice.logprobs.chosen, choice.logprobs.alternatives, strict=True):
        assert len(row) == 3
        assert row[0] == (token, chosen)
        assert chosen <= 0
        assert [value for _, value in row] == sorted((value for _, value in row), reverse=True)


def test_logit_bias_and_min_tokens_reach_the_engine(client: Client) -> None:
    forced = client.complete(PROMPT, max_tokens=4, temperature=0, logit_bias={100: 100.0}).choices[0]
    assert forced.token_ids == (100,) * 4


def test_text_ids_and_chat_give_the_same_prompt(client: Client) -> None:
    ids = [token.id for token in client.inspect(PROMPT).tokens]
    by_text = client.complete(PROMPT, max_tokens=10, temperature=0)
    assert client.complete(ids, max_tokens=10, temperature=0).text == by_text.text
    chat = client.inspect([{"role": "user", "content": PROMPT}])
    assert [t.id for t in chat.tokens].count(ids[0]) == 1
    assert chat.tokens[0].id == ids[0]


def test_bos_spelt_by_the_text_is_not_doubled(client: Client) -> None:
    tokens = client.inspect(PROMPT).tokens
    again = client.inspect(tokens[0].text + PROMPT).tokens
    assert [t.id for t in again] == [t.id for t in tokens]


@pytest.mark.parametrize("prompt", ["a<|bos|>b<|endoftext|>", [{"role": "user", "content": "a<|bos|>b<|endoftext|>"}]])
def test_special_tokens_of_a_client_are_text(client: Client, prompt: Any) -> None:
    for tokens in (client.inspect(prompt).tokens, client.tokenize(prompt)):
        assert [token.id for token in tokens if token.id < 2] == [1]
        assert "".join(token.text for token in tokens[1:]).strip() == "a<|bos|>b<|endoftext|>"


def test_prompt_that_ends_inside_a_character_is_not_in_the_output(client: Client) -> None:
    ids = [1, 41, 447, 80, 977, 222, 5643, 236]
    assert client.complete(ids, logit_bias={116: 100.0}, max_tokens=1, temperature=0).text == "\U0001f336"
    chunks = list(client.generate(ids, logit_bias={116: 100.0}, max_tokens=3, temperature=0))
    assert "Hello" not in joined(chunks)[0]


def test_tokenize_returns_the_tokens_of_a_prompt(client: Client) -> None:
    tokens = client.tokenize(PROMPT)
    assert [(t.id, t.text) for t in tokens] == [(t.id, t.text) for t in client.inspect(PROMPT).tokens]
    with pytest.raises(RudderError) as caught:
        client.tokenize("word " * 3000)
    assert caught.value.violations[0].field == "prompt.text"


def test_truncation_keeps_the_last_tokens_of_a_prompt(client: Client) -> None:
    ids = [token.id for token in client.tokenize(PROMPT)]
    cut = client.complete(PROMPT, max_tokens=4, temperature=0, truncate_prompt_tokens=3).choices[0]
    assert cut.usage is not None
    assert cut.usage.prompt_tokens == 3
    assert cut.text == client.complete(ids[-3:], max_tokens=4, temperature=0).text


def test_last_message_is_continued(client: Client) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The cells"}]
    continued = client.tokenize(Chat(messages, continue_final_message=True))
    assert "".join(token.text for token in continued[1:]) == "x\nThe cells"


@pytest.mark.parametrize(
    ("structured", "pattern"),
    [
        (Structured(regex="[a-c]{3}[0-9]"), "[a-c]{3}[0-9]"),
        (Structured(choice=["cell wall", "virus"]), "cell wall|virus"),
        (Structured(grammar='root ::= "yes" | "no"'), "yes|no"),
        (Structured(json_schema={"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
                                 "additionalProperties": False}), r'\{\s*"n"\s*:\s*[12]\s*\}?'),
    ],
    ids=["regex", "choice", "grammar", "json_schema"],
)  # fmt: skip
def test_output_has_the_form_asked_for(client: Client, structured: Structured, pattern: str) -> None:
    for program in (None, push(7)):
        choice = client.complete(PROMPT, max_tokens=40, temperature=0, structured=structured, steer=program).choices[0]
        assert re.fullmatch(pattern, choice.text), choice.text
        # JSON may have any white space, which this small model likes.
        assert choice.finish_reason == "stop" or structured.json_schema


def test_bad_words_and_allowed_tokens_reach_the_engine(client: Client) -> None:
    plain = client.complete(PROMPT, max_tokens=8, temperature=0)
    word = plain.text.split()[0]
    assert word not in client.complete(PROMPT, max_tokens=8, temperature=0, bad_words=[word]).text.split()[:1]
    allowed = client.complete(PROMPT, max_tokens=6, temperature=0, allowed_token_ids=[100, 200]).choices[0]
    assert set(allowed.token_ids) <= {100, 200}


def test_special_tokens_are_in_the_text_on_request(client: Client) -> None:
    for skip, text in ((True, ""), (False, "<|bos|><|bos|>")):
        choice = client.complete(PROMPT, logit_bias={1: 100.0}, max_tokens=2, temperature=0, skip_special_tokens=skip)
        assert choice.text == text


def test_log_probabilities_of_the_prompt(client: Client) -> None:
    ids = [token.id for token in client.tokenize(PROMPT)]
    for _ in range(2):  # also when the prefix cache holds the prompt
        choice = client.complete(ids, max_tokens=1, temperature=0, prompt_logprobs=2).choices[0]
        assert choice.prompt_logprobs is not None
        assert len(choice.prompt_logprobs.chosen) == len(ids) - 1
        assert all(value <= 0 for value in choice.prompt_logprobs.chosen)
        assert all(len(row) == 2 for row in choice.prompt_logprobs.alternatives)
    greedy = client.complete(ids, max_tokens=1, temperature=0, logprobs=1).choices[0]
    assert greedy.logprobs is not None
    longer = client.complete([*ids, *greedy.token_ids], max_tokens=1, prompt_logprobs=1).choices[0]
    assert longer.prompt_logprobs is not None
    assert longer.prompt_logprobs.chosen[-1] == pytest.approx(greedy.logprobs.chosen[0], abs=1e-3)
    chunks = list(client.generate(ids, max_tokens=3, prompt_logprobs=0))
    assert [chunk.prompt_logprobs is not None for chunk in chunks] == [True, *[False] * (len(chunks) - 1)]


def test_stop_reason_tells_a_string_from_a_token(client: Client) -> None:
    by_token = client.complete(PROMPT, logit_bias={100: 100.0}, stop_token_ids=[100], max_tokens=3).choices[0]
    assert (by_token.stop_string, by_token.stop_token_id, by_token.stop_reason) == (None, 100, "100")
    text = client.complete(PROMPT, max_tokens=10, temperature=0).text
    by_string = client.complete(PROMPT, max_tokens=10, temperature=0, stop=[text[3:5]]).choices[0]
    assert (by_string.stop_string, by_string.stop_token_id) == (text[3:5], None)
    by_length = client.complete(PROMPT, max_tokens=1).choices[0]
    assert (by_length.stop_string, by_length.stop_token_id, by_length.stop_reason) == (None, None, "")


def test_every_limit_is_published(client: Client) -> None:
    limits = client.model().limits
    assert all(getattr(limits, field.name) for field in limits.DESCRIPTOR.fields)


def test_features_are_reported_at_their_positions(client: Client) -> None:
    """Watched features, top-k latents and Inspect agree, position by position."""
    inspection = client.inspect(PROMPT, report=Report(top_k=3))
    strongest = [token.activations[0] for token in inspection.tokens]
    named = sorted({a.feature.index for a in strongest})
    report = Report(features={SITE: named}, prompt=True)
    chunks = list(client.generate(PROMPT, report=report, max_tokens=8, temperature=0))
    reported = {(a.position, a.feature.index): a.value for c in chunks for a in c.activations}
    for activation in strongest:
        assert reported[activation.position, activation.feature.index] == pytest.approx(activation.value, rel=1e-3)
    _, ids = joined(chunks)
    whole = client.inspect([t.id for t in inspection.tokens] + list(ids), report=Report(features={SITE: named}))
    inspected = {(a.position, a.feature.index): a.value for t in whole.tokens[:-1] for a in t.activations}
    assert reported.keys() == inspected.keys()
    for key, value in reported.items():
        assert value == pytest.approx(inspected[key], rel=2e-3, abs=2e-3), key


def test_labels_come_from_the_catalogue(client: Client) -> None:
    for token in client.inspect(PROMPT).tokens:
        for activation in token.activations:
            feature = activation.feature
            assert feature.label == client.feature(feature.index, feature.bundle).summary.label


def test_prompt_is_reported_only_on_request(client: Client) -> None:
    length = len(client.inspect(PROMPT).tokens)
    chunks = list(client.generate(PROMPT, report=Report(top_k=2), max_tokens=6, temperature=0))
    positions = {a.position for c in chunks for a in c.activations}
    assert positions == set(range(length, length + 5))


def test_pooled_features_equal_the_sums_over_tokens(client: Client) -> None:
    report = Report(features={SITE: [7]}, top_k=4, prompt=True, pooled=True)
    choice = client.complete(PROMPT, report=report, max_tokens=10, temperature=0).choices[0]
    after_bos = [a for a in choice.activations if a.position > 0]
    for pooled in choice.pooled:
        values = [a.value for a in after_bos if a.feature == pooled.feature]
        assert pooled.sum == pytest.approx(sum(values), rel=1e-4)
        assert pooled.active_tokens == len(values)
        assert pooled.max == pytest.approx(max(values, default=0))
    assert 7 in [p.feature.index for p in choice.pooled]
    pooled_only = Report(features={SITE: [7]}, top_k=4, prompt=True, pooled=True, tokens=False)
    without_tokens = client.complete(PROMPT, report=pooled_only, max_tokens=10, temperature=0).choices[0]
    assert without_tokens.activations == ()
    assert without_tokens.pooled == choice.pooled


def test_probe_reports_its_score(client: Client) -> None:
    width = client.model().hidden_size
    probe = Probe([0.0] * (width - 1) + [1e-9], bias=2.5, name="constant")
    inspection = client.inspect(PROMPT, report=Report(features={SITE: [probe]}))
    for token in inspection.tokens:
        (activation,) = token.activations
        assert activation.feature.label == "constant"
        assert activation.value == pytest.approx(2.5, rel=1e-4)


def test_inspect_attests_the_edits_of_its_program(client: Client) -> None:
    """A site reads activations before its own edits; later sites read the edited residual."""
    inspection = client.inspect(PROMPT, steer=push(7), report=Report(features={SITE: [Feature(7)]}))
    assert inspection.attestation.edits[0].tokens_touched == len(inspection.tokens) - 1


def test_stream_interval_joins_tokens_in_messages(client: Client) -> None:
    chunks = list(client.generate(PROMPT, max_tokens=33, temperature=0, stream_interval=10))
    assert sum(len(c.token_ids) for c in chunks) == 33
    assert len(chunks) <= 5


def test_catalogue(client: Client) -> None:
    bundle = client.model().bundles[0]
    features = list(client.features())
    assert [f.index for f in features] == list(range(bundle.latents))
    detail = client.feature(7)
    assert detail.summary == features[7]
    word = next(w for f in features for w in f.label.replace(",", " ").split() if w.isalpha() and len(w) > 5)
    matches = client.search(word, limit=5)
    assert matches
    assert all(word[:5].lower() in f.label.lower() for f in matches)
    assert client.search('xyzzy ("* xyzzy*') == []
    with pytest.raises(RudderError, match="FEATURE_UNKNOWN"):
        client.feature(bundle.latents)


def test_model_and_limits(client: Client) -> None:
    model = client.model()
    assert (model.hidden_size, model.layers, model.max_model_len) == (192, 6, 1024)
    assert [site.site for site in model.sites] == [SITE]
    assert len(model.bundles[0].sha256) == len(model.model_sha256) == 64
    limits = {field.name: value for field, value in model.limits.ListFields()}
    assert limits.keys() == set(model.limits.DESCRIPTOR.fields_by_name)
    assert limits["max_tokens"] == 1023


def test_deltas_name_each_feature_once(client: Client) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(client.channel)
    request = generate_request(PROMPT, None, Report(features={SITE: [7]}, top_k=5), "", 0, {"max_tokens": 12})
    messages: list[inference_pb2.GenerateResponse] = list(stub.Generate(request))
    named = [(f.site, f.index) for message in messages for f in message.features]
    assert len(named) == len(set(named))
    assert named[0] == (SITE, 7)
    used = {number for m in messages for choice in m.choices for number in choice.activations.features}
    assert max(used) < len(named)
