"""What is imported is measured on real text, refused where the text speaks against it, and never half written."""

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
from rudder.sae_models.importing.importer import Imported, ImportRefused, Wish
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
    """The texts of the catalogue's contexts, sorted by the books they are from."""
    books: dict[str, list[str]] = {}
    for index in range(0, shipped.manifest.latents, 6):
        for context in shipped.catalogue.get(index).contexts[:1]:
            books.setdefault(context.source, []).append(f"{context.before}{context.token}{context.after}")
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"book": book, "text": "\n".join(text)}) for book, text in books.items()))
    return path


@pytest.fixture(scope="module")
def imported(shipped: Bundle, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """The shipped SAE in bfloat16, as if it were somebody else's."""
    folder = tmp_path_factory.mktemp("imported")
    rows = [{"modelId": "textbook-lm", "layer": "2-res", "index": 7, "description": "transport", "typeName": "np"}]
    (folder / "labels.json").write_text(json.dumps(rows))
    wish = Wish(MODEL, folder / "toy", corpus=corpus, tokens=TOKENS, labels=folder / "labels.json", credit="a credit")
    return importing.make(loaded(half(shipped.sae)), Source("toy", "somewhere", "main", 31.9), wish)


def half(sae: SAE) -> SAE:
    """With matrices in bfloat16."""
    return replace(sae, encoder=sae.encoder.bfloat16(), decoder=sae.decoder.bfloat16())


def loaded(sae: SAE, **declared: Any) -> Loaded:
    """As a reader gives it."""
    says: dict[str, Any] = {"sites": (SITE,), "folded": ("pre_bias",)} | declared
    return Loaded("toy", "for a test", sae, Declaration("batch_topk", **says))


def random_sae(latents: int = 40, width: int = 192) -> SAE:
    """Random weights and positive thresholds."""
    g = torch.Generator().manual_seed(0)
    encoder, decoder = torch.randn(latents, width, generator=g), torch.randn(latents, width, generator=g)
    bias, threshold = torch.randn(latents, generator=g), torch.rand(latents, generator=g)
    return SAE(encoder, bias, threshold, decoder, torch.randn(width, generator=g))


def test_figures_and_statistics_are_of_the_text(shipped: Bundle, imported: Imported) -> None:
    made, claimed = imported.bundle, shipped.manifest.training
    training = made.manifest.training
    assert claimed.l0 is not None
    assert claimed.fvu is not None
    assert training.l0 == pytest.approx(claimed.l0, rel=0.2)
    assert training.fvu == pytest.approx(claimed.fvu, rel=0.2)
    assert (training.tokens, training.ce_recovered, training.credit) == (None, None, "a credit")
    assert made.measured
    assert float(made.statistics.residual_norm) == pytest.approx(float(shipped.statistics.residual_norm), rel=0.1)
    common = shipped.statistics.frequency > 0.02
    assert bool(common.any())
    assert float((made.statistics.frequency / shipped.statistics.frequency)[common].log().abs().mean()) < 0.5


def test_conformance_tokens_are_typical_though_few_tokens_hold_most_of_the_variance() -> None:
    g = torch.Generator().manual_seed(0)
    sae, x = random_sae(400), torch.randn(4000, 192, generator=g)
    x[::500] *= 300
    whole = fidelity.measured(sae, x)
    plain = fidelity.measured(sae, x[: bundles.CONFORMANCE_TOKENS])
    kept = importing.typical(sae, x, None, Claims(whole.l0, whole.fvu))
    found = fidelity.measured(sae, kept.inputs)
    assert bundles.near(found.fvu, whole.fvu)
    assert not bundles.near(plain.fvu, whole.fvu), "any tokens would have done"


def test_the_manifest_tells_where_it_is_from(imported: Imported) -> None:
    manifest = imported.bundle.manifest
    assert manifest.source == Source("toy", "somewhere", "main", 31.9)
    assert (manifest.sites, manifest.output_site, manifest.dtype) == ((SITE,), SITE, "bfloat16")
    assert manifest.normalisation.folded == ("pre_bias",)
    assert imported.bundle.sae.encoder.dtype == torch.bfloat16
    assert {file.name for file in imported.bundle.path.parent.iterdir()} == {"toy", "labels.json"}
    bundles.check_model(imported.bundle, bundles.model_sha256(MODEL), 192)


def test_latents_are_described(imported: Imported) -> None:
    catalogue, statistics = imported.bundle.catalogue, imported.bundle.statistics
    index = int(statistics.frequency.argmax())
    found = catalogue.get(index)
    assert found.summary.origin == "corpus"
    assert found.summary.label
    assert found.contexts[0].activation == pytest.approx(float(statistics.max_activation[index]), rel=1e-3)
    assert list(found.quantiles) == sorted(found.quantiles)
    assert found.quantiles[-1] <= found.summary.max_activation  # type: ignore[operator]
    assert len(found.promoted) == len(found.suppressed) == 10
    assert found.promoted[0].logit > 0 > found.suppressed[0].logit


def test_labels_take_the_place_of_our_own(imported: Imported) -> None:
    assert imported.labels is not None
    assert (len(imported.labels.by_latent), imported.labels.rows) == (1, 1)
    summary = imported.bundle.catalogue.get(7).summary
    assert (summary.label, summary.origin) == ("transport", "neuronpedia np")
    assert [found.index for found in imported.bundle.catalogue.search("transport", 50)].count(7) == 1


def test_quantiles_are_those_of_the_activations() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.rand(3, 20_000, generator=g).pow(torch.tensor([[1.0], [4.0], [0.5]])) * 30
    histogram = torch.stack([torch.bincount(entries.bin_of(row), minlength=entries.BINS) for row in values])
    found = entries.quantiles(histogram.int(), values.amax(1))
    exact = torch.stack([row.quantile(torch.tensor(QUANTILES)) for row in values])
    assert float((found / exact).log().abs().max()) < 0.04
    nothing = entries.quantiles(torch.zeros(1, entries.BINS, dtype=torch.int32), torch.zeros(1))
    assert not nothing.any()


def test_without_text_nothing_is_claimed(tmp_path: Path) -> None:
    made = importing.make(loaded(random_sae()), Source("toy", "x", None, 4.0), Wish(MODEL, tmp_path / "toy"))
    assert made.verdict is None
    assert not made.bundle.measured
    assert made.bundle.manifest.training.l0 is None
    assert made.bundle.catalogue.get(3).summary.frequency is None
    assert bool((made.bundle.conformance.activations > 0).any(0).sum() > 20), "conformance vectors that hold nothing"
    assert checking.check(tmp_path / "toy", MODEL).holds


def saelens_folder(home: Path, sae: SAE, **settings: Any) -> Path:
    """As SAELens saves it."""
    saelens.write(home, sae, Declaration("jumprelu", (SITE,)))
    config = json.loads((home / "cfg.json").read_text())
    (home / "cfg.json").write_text(json.dumps(config | settings))
    return home


def test_a_scale_that_was_taken_for_1_is_told_by_the_import_and_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saelens_folder(tmp_path / "sae", random_sae(), normalize_activations="expected_average_only_in")
    words = ["bundle", "import", str(folder), "--model", str(MODEL), "--out", str(tmp_path / "toy")]
    assert cli.main(words) == 0
    told = "input_scale: not in the files, taken as 1"
    assert f"ASSUMED {told}" in capsys.readouterr().err
    normalisation = bundles.load(tmp_path / "toy").manifest.normalisation
    assert normalisation.declared == "expected_average_only_in"
    assert normalisation.assumed.startswith(told)


def test_a_scale_that_is_known_is_not_assumed(tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path / "sae", random_sae(), normalize_activations="expected_average_only_in")
    scaled = importing.with_scale(load(folder), 2.0)
    made = importing.make(scaled, Source("toy", "x"), Wish(MODEL, tmp_path / "toy"))
    assert made.bundle.manifest.normalisation == InputNormalisation(
        "expected_average_only_in", ("input_scale",), Normalisation.NONE, ""
    )
    assert torch.allclose(made.bundle.sae.encoder, 2 * random_sae().encoder)


def test_a_transcoder_and_a_router_are_imported(tmp_path: Path, corpus: Path) -> None:
    skip = replace(random_sae(), skip=torch.eye(192))
    mlp = loaded(skip, sites=("layers.1.mlp_in",), output_site="layers.1.mlp_out")
    made = importing.make(mlp, Source("toy", "x"), Wish(MODEL, tmp_path / "mlp"))
    assert made.bundle.manifest.transcodes
    g = torch.Generator().manual_seed(0)
    routed = replace(random_sae(), selection=TopK(8), router=Router(torch.randn(2, 192, generator=g)))
    sites = ("layers.1.resid_post", SITE)
    wish = Wish(MODEL, tmp_path / "routed", sites=sites, corpus=corpus, tokens=1000)
    with pytest.raises(ImportRefused, match=r"^convention: L0 8 and FVU .*--accept"):
        importing.make(loaded(routed, sites=()), Source("toy", "x"), wish)
    wish = replace(wish, accept=True)
    made = importing.make(loaded(routed, sites=()), Source("toy", "x"), wish)
    assert made.bundle.manifest.sites == sites
    assert made.bundle.manifest.training.l0 == pytest.approx(8, abs=0.01)
    assert made.bundle.conformance.inputs.shape[1:] == (2, 192)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("site: the toy checkpoint does not tell", lambda it: replace(it, declared=Declaration("relu"))),
        ("d: the SAE has 16, the residual stream of .* has 192", lambda it: replace(it, sae=random_sae(40, 16))),
    ],
)
def test_what_cannot_fit_is_refused_by_field(tmp_path: Path, reason: str, change: Callable[[Loaded], Loaded]) -> None:
    with pytest.raises(ImportRefused, match=f"^{reason}"):
        importing.make(change(loaded(random_sae())), Source("toy", "x"), Wish(MODEL, tmp_path / "toy"))
    assert not any(tmp_path.iterdir())


def test_a_square_sae_needs_text(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="orientation cannot be told"):
        importing.make(loaded(random_sae(192)), Source("toy", "x"), Wish(MODEL, tmp_path / "toy"))
    assert not any(tmp_path.iterdir())


def test_an_sae_that_text_speaks_against_is_refused_with_its_cure(
    shipped: Bundle, corpus: Path, tmp_path: Path
) -> None:
    broken = loaded(replace(shipped.sae, threshold=torch.zeros(shipped.manifest.latents)))
    wish = Wish(MODEL, tmp_path / "toy", corpus=corpus, tokens=TOKENS)
    with pytest.raises(ImportRefused, match=r"^convention: L0 .*'threshold' fits best.*--accept"):
        importing.make(broken, Source("toy", "x", None, 31.9), wish)
    assert not any(tmp_path.iterdir())
    made = importing.make(broken, Source("toy", "x", None, 31.9), replace(wish, accept=True))
    assert made.verdict is not None
    assert not made.verdict.stands


def test_labels_of_another_model_stop_the_import(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('[{"modelId": "gpt2-small", "layer": "2-res-jb", "index": "0"}]')
    wish = Wish(MODEL, tmp_path / "toy", labels=tmp_path / "labels.json")
    with pytest.raises(LabelError, match=r"^modelId: 'gpt2-small'"):
        importing.make(loaded(random_sae()), Source("toy", "x"), wish)
    assert not (tmp_path / "toy").exists()
    importing.make(loaded(random_sae()), Source("toy", "x"), replace(wish, labels_model="gpt2-small"))


def test_a_check_goes_on_after_what_is_wrong(imported: Imported, corpus: Path, tmp_path: Path) -> None:
    path = imported.bundle.path
    fields = {finding.field: finding.holds for finding in checking.check(path, MODEL, corpus).findings}
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
    report = checking.check(broken, MODEL, corpus)
    wrong = {finding.field for finding in report.findings if not finding.holds}
    assert wrong == {"files", "conformance", "model", "l0", "convention"}
    assert not report.holds
