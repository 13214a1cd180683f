"""A derived policy: its file fits the contract, its rows are a bundle, its report warns of latents of a format."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from google.protobuf.json_format import ParseDict

from rudder.sae_models.analysis.unlearning import policy
from rudder.sae_models.analysis.unlearning.material import gather
from rudder.sae_models.analysis.unlearning.methods import METHODS, Fitted
from rudder.sae_models.analysis.unlearning.policy import Derived
from rudder.sae_models.analysis.unlearning.steering import AlarmGate
from rudder.sae_models.bundle import bundle
from rudder.sae_models.errors import UserError
from rudder.sae_models.sae import Rows, activations
from rudder.server.cli.policy import derive
from rudder.v1.policy_pb2 import Policy
from tests.unit.sae_models.analysis.unlearning.rigs import SMALL, TOPIC, rig, save_corpus


@pytest.fixture(scope="module")
def derived(tmp_path_factory: pytest.TempPathFactory) -> Derived:
    folder: Path = tmp_path_factory.mktemp("policy")
    fitted = Fitted(gather(rig(), save_corpus(folder / "corpus.jsonl"), TOPIC, SMALL), 0, 1)
    rows = policy.write_rows(folder / "rows", fitted.learned_rows, fitted, rig().bundle.manifest.model)
    return Derived(fitted, 1.5, rows)


def test_rows_are_a_bundle_of_the_model(derived: Derived) -> None:
    loaded = bundle.load(derived.rows.path)
    assert loaded.manifest.model == rig().bundle.manifest.model
    assert loaded.manifest.site == rig().bundle.manifest.site
    x = derived.fitted.forget[:20]
    trained = derived.fitted.learned_rows
    torch.testing.assert_close(loaded.sae.encode(x), activations(x, trained), atol=1e-3, rtol=1e-4)
    loaded.catalogue.close()


def test_file_is_the_method_in_the_contract(derived: Derived, tmp_path: Path) -> None:
    path = tmp_path / "forget.yaml"
    policy.write_policy(path, policy.policy_of(derived, "forget"))
    message = ParseDict(yaml.safe_load(path.read_text()), Policy())
    assert message.binds.all
    assert dict(message.bundles) == {derived.rows.manifest.name: derived.rows.sha256}
    (site,) = message.program.sites
    assert [edit.row.feature.index for edit in site.edits] == list(range(derived.rows.manifest.latents))
    assert {edit.scale for edit in site.edits} == {2.5}
    (guard,) = message.guards
    gate = message.program.gate.sequence
    assert guard.score.terms[0].row == gate.score
    assert (guard.level, guard.min_tokens, guard.window) == (gate.level, gate.min_tokens, gate.window)
    assert gate.level == pytest.approx(derived.gate.level, abs=0.01)
    assert gate.latch


def test_file_opens_where_the_method_does(derived: Derived) -> None:
    """Weights in the file are rounded, by less than what tells texts apart."""
    probe = policy.policy_of(derived, "forget")["program"]["gate"]["sequence"]["score"]["probe"]
    written = replace(derived.gate.detector, weights=torch.tensor(probe["weights"]), bias=probe["bias"])
    texts = derived.fitted.material.windows
    context = texts.context(torch.arange(len(texts)))
    statistic, rounded = (gate.statistic(context) for gate in (derived.gate, AlarmGate(written, derived.gate.level)))
    torch.testing.assert_close(statistic, rounded, atol=1e-2, rtol=1e-3)


def test_report_names_the_topic_and_promises_no_erasure(derived: Derived) -> None:
    text = policy.markdown(derived, "forget", ["| figures |"], ["| books |"])
    assert "inaccessible through this server" in text
    assert "weights still hold the topic" in text
    assert "erase" not in text.lower()
    assert "| figures |" in text


def test_a_planted_latent_of_punctuation_is_named(derived: Derived) -> None:
    fitted = derived.fitted
    tokens, x = fitted.material.windows.windows, fitted.material.windows.x
    full_stop = rig().token_ids(".")[0]
    at = (tokens.tokens == full_stop) & tokens.counted
    mean, rest = x[at].mean(0), x[tokens.counted & ~at].mean(0)
    direction = mean - rest
    bias = -(direction @ (mean + rest)) / 2
    planted = Rows(torch.stack([direction, -direction]), torch.stack([bias, -bias]), torch.zeros(2), torch.eye(192)[:2])
    sae = rig().bundle.sae
    changed = replace(
        sae,
        encoder=torch.cat([planted.encoder, sae.encoder[2:]]),
        bias=torch.cat([planted.bias, sae.bias[2:]]),
        threshold=torch.cat([planted.threshold, sae.threshold[2:]]),
    )
    material = replace(fitted.material, rig=replace(rig(), bundle=replace(rig().bundle, sae=changed)))
    punctuation, words = policy.formatting_share(Fitted(material, 0, 1), [0, 1]).tolist()
    assert punctuation > policy.FORMATTING > words


def test_methods_note_what_they_are() -> None:
    assert all(method.note and method.low <= method.high for method in METHODS.values())


def test_command_derives_a_policy_that_the_contract_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derive, "QUICK", SMALL)
    corpus = save_corpus(tmp_path / "corpus.jsonl")
    out = tmp_path / "policies" / "forget.yaml"
    derive.main(
        ["--corpus", str(corpus), "--topic", "microbiology", "--neighbours", "anatomy", "--out", str(out), "--quick"]
    )
    assert ParseDict(yaml.safe_load(out.read_text()), Policy()).name == "forget"
    assert "| forget loss gap |" in out.with_suffix(".md").read_text()
    bundle.load(out.parent / "forget-rows").catalogue.close()


def test_command_names_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a YAML file"):
        derive.main(["--corpus", "corpus.jsonl", "--topic", "micro", "--out", str(tmp_path / "policy.json")])
