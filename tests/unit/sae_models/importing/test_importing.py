"""Imports measure an SAE on real text, refuse it where its figures contradict the claims, and are atomic."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rudder.sae_models import PRETRAINED, fidelity
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.bundle.bundle import Bundle, BundleError, InputNormalisation, Source
from rudder.sae_models.bundle.catalogue import QUANTILES
from rudder.sae_models.evaluation import activity as entries
from rudder.sae_models.evaluation.labels import LabelError
from rudder.sae_models.formats import saelens
from rudder.sae_models.formats.load import load
from rudder.sae_models.formats.source import Declaration, Loaded
from rudder.sae_models.importing import check as checking
from rudder.sae_models.importing import importer as importing
from rudder.sae_models.importing.convention import Claims
from rudder.sae_models.importing.importer import ImportRefused, ImportRequest, ImportResult
from rudder.sae_models.sae import SAE, Normalisation, Router, TopK
from rudder.server import cli

MODEL = PRETRAINED / "textbook-lm"
SITE = "layers.2.resid_post"
TOKENS = 1500


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    return bundles.load(PRETRAINED / "textbook-lm-layers.2")


@pytest.fixture(scope="module")
def corpus(shipped: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a corpus of the catalogue's contexts by book; return its path."""
    books: dict[str, list[str]] = {}
    for index in range(0, shipped.manifest.latents, 6):
        for context in shipped.catalogue.get(index).contexts[:1]:
            books.setdefault(context.source, []).append(f"{context.before}{context.token}{context.after}")
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"book": book, "text": "\n".join(text)}) for book, text in books.items()))
    return path


@pytest.fixture(scope="module")
def imported(shipped: Bundle, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ImportResult:
    """Import the shipped SAE in bfloat16, as if others had trained it."""
    folder = tmp_path_factory.mktemp("imported")
    records = [{"modelId": "textbook-lm", "layer": "2-res", "index": 7, "description": "transport", "typeName": "np"}]
    (folder / "labels.json").write_text(json.dumps(records))
    request = ImportRequest(
        MODEL, folder / "toy", corpus=corpus, tokens=TOKENS, labels=folder / "labels.json", credit="a credit"
    )
    return importing.import_sae(loaded(half(shipped.sae)), Source("toy", "somewhere", "main", 31.9), request)


def half(sae: SAE) -> SAE:
    """Return an SAE with matrices in bfloat16."""
    return replace(sae, encoder=sae.encoder.bfloat16(), decoder=sae.decoder.bfloat16())


def loaded(sae: SAE, **declared: Any) -> Loaded:
    """Return an SAE as a reader does."""
    fields: dict[str, Any] = {"sites": (SITE,), "folded": ("pre_bias",)} | declared
    return Loaded("toy", "for a test", sae, Declaration("batch_topk", **fields))


def random_sae(latents: int = 40, width: int = 192) -> SAE:
    """Return an SAE with random weights and positive thresholds."""
    g = torch.Generator().manual_seed(0)
    encoder, decoder = torch.randn(latents, width, generator=g), torch.randn(latents, width, generator=g)
    bias, threshold = torch.randn(latents, generator=g), torch.rand(latents, generator=g)
    return SAE(encoder, bias, threshold, decoder, torch.randn(width, generator=g))


def test_figures_and_statistics_are_measured_on_the_corpus(shipped: Bundle, imported: ImportResult) -> None:
    bundle, claimed = imported.bundle, shipped.manifest.training
    training = bundle.manifest.training
    assert claimed.l0 is not None
    assert claimed.fvu is not None
    assert training.l0 == pytest.approx(claimed.l0, rel=0.2)
    assert training.fvu == pytest.approx(claimed.fvu, rel=0.2)
    assert (training.tokens, training.ce_recovered, training.credit) == (None, None, "a credit")
    assert bundle.measured
    assert float(bundle.statistics.residual_norm) == pytest.approx(float(shipped.statistics.residual_norm), rel=0.1)
    common = shipped.statistics.frequency > 0.02
    assert bool(common.any())
    assert float((bundle.statistics.frequency / shipped.statistics.frequency)[common].log().abs().mean()) < 0.5


def test_conformance_tokens_are_typical_where_few_tokens_hold_most_of_the_variance() -> None:
    g = torch.Generator().manual_seed(0)
    sae, x = random_sae(400), torch.randn(4000, 192, generator=g)
    x[::500] *= 300
    whole = fidelity.measure(sae, x)
    plain = fidelity.measure(sae, x[: bundles.CONFORMANCE_TOKENS])
    conformance = importing.typical_conformance(sae, x, None, Claims(whole.l0, whole.fvu))
    typical = fidelity.measure(sae, conformance.inputs)
    assert bundles.confirms(typical.fvu, whole.fvu)
    assert not bundles.confirms(plain.fvu, whole.fvu), "any tokens would have done"


def test_manifest_records_the_source(imported: ImportResult) -> None:
    manifest = imported.bundle.manifest
    assert manifest.source == Source("toy", "somewhere", "main", 31.9)
    assert (manifest.sites, manifest.output_site, manifest.dtype) == ((SITE,), SITE, "bfloat16")
    assert manifest.normalisation.folded == ("pre_bias",)
    assert imported.bundle.sae.encoder.dtype == torch.bfloat16
    assert {file.name for file in imported.bundle.path.parent.iterdir()} == {"toy", "labels.json"}
    bundles.check_model(imported.bundle, bundles.model_sha256(MODEL), 192)


def test_catalogue_describes_latents(imported: ImportResult) -> None:
    catalogue, statistics = imported.bundle.catalogue, imported.bundle.statistics
    labelled = next(s for s in catalogue.page(-1, len(catalogue)) if s.origin.startswith("corpus"))
    index, latent = labelled.index, catalogue.get(labelled.index)
    assert latent.summary.label
    assert len(latent.neighbours) == 8
    assert latent.contexts[0].activation == pytest.approx(float(statistics.max_activation[index]), rel=1e-3)
    assert list(latent.quantiles) == sorted(latent.quantiles)
    assert latent.quantiles[-1] <= latent.summary.max_activation  # type: ignore[operator]
    assert len(latent.promoted) == len(latent.suppressed) == 10
    assert latent.promoted[0].logit > 0 > latent.suppressed[0].logit


def test_imported_labels_replace_automatic_labels(imported: ImportResult) -> None:
    assert imported.labels is not None
    assert (len(imported.labels.by_latent), imported.labels.records) == (1, 1)
    summary = imported.bundle.catalogue.get(7).summary
    assert (summary.label, summary.origin) == ("transport", "neuronpedia np")
    assert [match.index for match in imported.bundle.catalogue.search("transport", 50)].count(7) == 1


def test_quantiles_of_a_histogram_are_close_to_exact() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.rand(3, 20_000, generator=g).pow(torch.tensor([[1.0], [4.0], [0.5]])) * 30
    histogram = torch.stack([torch.bincount(entries.bin_of(row), minlength=entries.BINS) for row in values])
    estimated = entries.quantiles(histogram.int(), values.amax(1))
    exact = torch.stack([row.quantile(torch.tensor(QUANTILES)) for row in values])
    assert float((estimated / exact).log().abs().max()) < 0.04
    nothing = entries.quantiles(torch.zeros(1, entries.BINS, dtype=torch.int32), torch.zeros(1))
    assert not nothing.any()


def test_import_without_corpus_claims_no_figures(tmp_path: Path) -> None:
    request = ImportRequest(MODEL, tmp_path / "toy")
    result = importing.import_sae(loaded(random_sae()), Source("toy", "x", None, 4.0), request)
    assert result.verdict is None
    assert not result.bundle.measured
    assert result.bundle.manifest.training.l0 is None
    assert result.bundle.catalogue.get(3).summary.frequency is None
    assert bool((result.bundle.conformance.activations > 0).any(0).sum() > 20), "conformance vectors that hold nothing"
    assert checking.check_bundle(tmp_path / "toy", MODEL).holds


def saelens_folder(home: Path, sae: SAE, **settings: Any) -> Path:
    """Write an SAE as SAELens does, with further settings; return the folder."""
    saelens.write(home, sae, Declaration("jumprelu", (SITE,)))
    config = json.loads((home / "cfg.json").read_text())
    (home / "cfg.json").write_text(json.dumps(config | settings))
    return home


def test_import_and_manifest_report_an_assumed_input_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saelens_folder(tmp_path / "sae", random_sae(), normalize_activations="expected_average_only_in")
    words = ["bundle", "import", str(folder), "--model", str(MODEL), "--out", str(tmp_path / "toy")]
    assert cli.main(words) == 0
    assumption = "input_scale: not in the files, taken as 1"
    assert f"ASSUMED {assumption}" in capsys.readouterr().err
    normalisation = bundles.load(tmp_path / "toy").manifest.normalisation
    assert normalisation.declared == "expected_average_only_in"
    assert normalisation.assumed.startswith(assumption)


def test_known_input_scale_is_folded_in(tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path / "sae", random_sae(), normalize_activations="expected_average_only_in")
    scaled = importing.with_input_scale(load(folder), 2.0)
    result = importing.import_sae(scaled, Source("toy", "x"), ImportRequest(MODEL, tmp_path / "toy"))
    assert result.bundle.manifest.normalisation == InputNormalisation(
        "expected_average_only_in", ("input_scale",), Normalisation.NONE, ""
    )
    assert torch.allclose(result.bundle.sae.encoder, 2 * random_sae().encoder)


def test_import_of_a_transcoder_and_a_routed_sae(tmp_path: Path, corpus: Path) -> None:
    skip = replace(random_sae(), skip=torch.eye(192))
    mlp = loaded(skip, sites=("layers.1.mlp_in",), output_site="layers.1.mlp_out")
    result = importing.import_sae(mlp, Source("toy", "x"), ImportRequest(MODEL, tmp_path / "mlp"))
    assert result.bundle.manifest.transcodes
    g = torch.Generator().manual_seed(0)
    routed = replace(random_sae(), selection=TopK(8), router=Router(torch.randn(2, 192, generator=g)))
    sites = ("layers.1.resid_post", SITE)
    request = ImportRequest(MODEL, tmp_path / "routed", sites=sites, corpus=corpus, tokens=1000)
    with pytest.raises(ImportRefused, match=r"^convention: L0 8 and FVU .*--accept"):
        importing.import_sae(loaded(routed, sites=()), Source("toy", "x"), request)
    request = replace(request, accept=True)
    result = importing.import_sae(loaded(routed, sites=()), Source("toy", "x"), request)
    assert result.bundle.manifest.sites == sites
    assert result.bundle.manifest.training.l0 == pytest.approx(8, abs=0.01)
    assert result.bundle.conformance.inputs.shape[1:] == (2, 192)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("site: the toy checkpoint does not say", lambda it: replace(it, declared=Declaration("relu"))),
        ("d: the SAE has 16, the residual stream of .* has 192", lambda it: replace(it, sae=random_sae(40, 16))),
    ],
)
def test_import_refusal_names_the_field(tmp_path: Path, reason: str, change: Callable[[Loaded], Loaded]) -> None:
    with pytest.raises(ImportRefused, match=f"^{reason}"):
        importing.import_sae(change(loaded(random_sae())), Source("toy", "x"), ImportRequest(MODEL, tmp_path / "toy"))
    assert not any(tmp_path.iterdir())


def test_import_of_a_square_sae_needs_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="orientation is ambiguous"):
        importing.import_sae(loaded(random_sae(192)), Source("toy", "x"), ImportRequest(MODEL, tmp_path / "toy"))
    assert not any(tmp_path.iterdir())


def test_refusal_of_contradicting_figures_names_the_cure(shipped: Bundle, corpus: Path, tmp_path: Path) -> None:
    broken = loaded(replace(shipped.sae, threshold=torch.zeros(shipped.manifest.latents)))
    request = ImportRequest(MODEL, tmp_path / "toy", corpus=corpus, tokens=TOKENS)
    with pytest.raises(ImportRefused, match=r"^convention: L0 .*'threshold' fits best.*--accept"):
        importing.import_sae(broken, Source("toy", "x", None, 31.9), request)
    assert not any(tmp_path.iterdir())
    result = importing.import_sae(broken, Source("toy", "x", None, 31.9), replace(request, accept=True))
    assert result.verdict is not None
    assert not result.verdict.stands


def test_import_refuses_labels_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('[{"modelId": "gpt2-small", "layer": "2-res-jb", "index": "0"}]')
    request = ImportRequest(MODEL, tmp_path / "toy", labels=tmp_path / "labels.json")
    with pytest.raises(LabelError, match=r"^modelId: 'gpt2-small'"):
        importing.import_sae(loaded(random_sae()), Source("toy", "x"), request)
    assert not (tmp_path / "toy").exists()
    importing.import_sae(loaded(random_sae()), Source("toy", "x"), replace(request, labels_model="gpt2-small"))


def test_check_reports_every_failure(imported: ImportResult, corpus: Path, tmp_path: Path) -> None:
    path = imported.bundle.path
    fields = {finding.field: finding.holds for finding in checking.check_bundle(path, MODEL, corpus).findings}
    assert all(fields.values()), fields
    assert fields.keys() >= {"manifest.json", "files", "values", "conformance", "model", "l0", "fvu", "convention"}
    content = json.loads((path / bundles.MANIFEST).read_text())
    content["training"]["l0"], content["model"]["sha256"], content["files"]["catalogue.sqlite"] = 3.0, "00", "00"
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in path.iterdir():
        (broken / file.name).symlink_to(file)
    (broken / bundles.MANIFEST).unlink()
    (broken / bundles.MANIFEST).write_text(json.dumps(content))
    report = checking.check_bundle(broken, MODEL, corpus)
    wrong = {finding.field for finding in report.findings if not finding.holds}
    assert wrong == {"files", "conformance", "model", "l0", "convention"}
    assert not report.holds
