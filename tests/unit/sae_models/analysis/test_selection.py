"""Selection of a topic's latents, detection of a topic, and the effect of programs on residuals."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.analysis import derive, detector, selection
from rudder.sae_models.analysis import program as p
from rudder.sae_models.analysis.program import Program
from rudder.sae_models.analysis.shipped import SHIPPED
from rudder.sae_models.analysis.unlearning import books
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.bundle.bundle import Bundle, Statistics
from rudder.sae_models.evaluation import splicing as metrics
from rudder.sae_models.sae import SAE
from rudder.server.cli.program import load_twin
from tests.unit.tiny import TEXTBOOK_LM

BOOKS = ("microbiology", "anatomy", "history")
# By latent: topic word, rarer topic word, everywhere, also the neighbour's, never, rare everywhere, common elsewhere.
FREQUENCY = torch.tensor(
    [
        [0.020, 0.010, 0.500, 0.030, 0.000, 0.0001, 0.200],
        [0.001, 0.002, 0.500, 0.020, 0.000, 0.0001, 0.030],
        [0.000, 0.000, 0.500, 0.000, 0.000, 0.0001, 0.010],
    ]
)


def test_select_returns_latents_frequent_on_the_topic_alone() -> None:
    assert selection.select(FREQUENCY, BOOKS, {"microbiology"}, {"anatomy"}, 10) == [0, 1]


def test_each_filter_of_select_has_an_effect() -> None:
    assert selection.select(FREQUENCY, BOOKS, {"microbiology"}, {"anatomy"}, 10, ceiling=0.1) == [6, 0, 1]
    assert selection.select(FREQUENCY, BOOKS, {"microbiology"}, {"anatomy"}, 10, ceiling=0.011, ratio=1.2) == [3, 0, 1]
    assert selection.select(FREQUENCY, BOOKS, {"microbiology"}, {"anatomy"}, 1) == [0]
    assert selection.select(FREQUENCY, BOOKS, {"history"}, {"anatomy"}, 10) == []


def test_detector_finds_a_planted_direction() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 10, generator=g) * torch.logspace(-1, 2, 10) + 50
    positive = torch.rand(4000, generator=g) < 0.3
    x[positive, 3] += 3 * x[:, 3].std()
    fitted = detector.fit(x, positive, torch.ones(4000))
    assert float(((fitted.score(x) > 0) == positive).float().mean()) > 0.9
    assert int((fitted.weights * x.std(0)).abs().argmax()) == 3


def test_detector_weights_each_token() -> None:
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    positive = torch.tensor([True, False, True, False])
    fitted = detector.fit(x, positive, torch.tensor([1.0, 3.0, 3.0, 1.0]))
    assert fitted.score(x)[0] == pytest.approx(-1.0986, abs=0.05)
    assert fitted.score(x)[2] == pytest.approx(1.0986, abs=0.05)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-8, 8), min_size=1, max_size=60), st.floats(-1, 2))
def test_cusum_equals_its_recursion(scores: list[float], drift: float) -> None:
    expected, state = [], 0.0
    for score in scores:
        state = max(0.0, state + score - drift)
        expected.append(state)
    assert detector.cusum(torch.tensor(scores, dtype=torch.float64), drift).tolist() == pytest.approx(
        expected, abs=1e-9
    )


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5])
def test_level_bounds_false_alarms(share: float) -> None:
    highest = torch.randn(199, generator=torch.Generator().manual_seed(0))
    level = detector.level_for(highest, share)
    alarms = float((highest > level).float().mean())
    assert share - 0.01 <= alarms <= share


def toy_bundle() -> Bundle:
    """Return the parts of a bundle that programs read, with two latents along axes of a space of three."""
    sae = SAE(torch.eye(3)[:2], torch.zeros(2), torch.full((2,), 0.5), torch.eye(3)[:2], torch.zeros(3))
    bundle = Bundle.__new__(Bundle)
    object.__setattr__(bundle, "sae", sae)
    object.__setattr__(
        bundle, "statistics", Statistics(torch.ones(2), torch.ones(2), torch.tensor([9.0, 9.0, 9.0]), torch.ones(()))
    )
    return bundle


def feature(index: int) -> p.Row:
    """Return a row that is a latent."""
    return p.Row(feature=p.Feature(index))


def run(program: Program, *tokens: tuple[float, float, float]) -> list[list[float]]:
    """Apply a program to one text."""
    edited: list[list[float]] = p.apply(program, toy_bundle(), torch.tensor([tokens])).x[0].tolist()
    return edited


def program(*edits: p.Edit, blend: p.Blend | None = None, gate: p.Gate | None = None) -> Program:
    """Return a program at one site."""
    return Program("toy", "", (p.SiteEdits("layers.0.resid_post", edits, blend),), gate)


def test_edits_follow_the_formula() -> None:
    x = (3.0, 0.2, 4.0)
    assert run(program(p.Edit(feature(0), clamp=-2.0), p.Edit(feature(1), clamp=-2.0)), x) == [
        pytest.approx([-2.0, 0.2, 4.0])
    ]
    assert run(program(p.Edit(feature(0), set=-2.0), p.Edit(feature(1), set=-2.0)), x) == [
        pytest.approx([-2.0, -1.8, 4.0])
    ]
    assert run(program(p.Edit(feature(1), add=2.0)), x) == [pytest.approx([3.0, 2.2, 4.0])]
    norm = (9 + 0.04 + 16) ** 0.5
    assert run(program(p.Edit(feature(0), set=2.0, unit=p.RESIDUAL_NORM)), x) == [pytest.approx([2 * norm, 0.2, 4.0])]


def test_blend_comes_after_the_edits() -> None:
    blended = run(program(p.Edit(feature(0), set=1.0), blend=p.Blend("toy", 0.5)), (3.0, 0.0, 1.0))
    assert blended == [pytest.approx([5.0, 4.5, 5.0])]
    assert run(program(blend=p.Blend("toy", 1.0)), (3.0, 0.0, 1.0)) == [[9.0, 9.0, 9.0]]


def test_gate_needs_both_conditions() -> None:
    score = p.Row(probe=p.Probe("axis", (0.0, 0.0, 1.0)))
    alarm = p.SequenceCondition(score, p.Cusum(1.0), 1.5)
    texts = ((1.0, 0.0, 2.0), (0.0, 0.0, 2.0), (1.0, 0.0, 2.0), (1.0, 0.0, -9.0))
    for gate, expected in (
        (p.Gate("layers.0.resid_post", (p.Trigger(feature(0)),)), [True, False, True, True]),
        (p.Gate("layers.0.resid_post", (), alarm), [False, True, True, False]),
        (p.Gate("layers.0.resid_post", (p.Trigger(feature(0)),), alarm), [False, False, True, False]),
        (
            p.Gate("layers.0.resid_post", (), p.SequenceCondition(score, p.Cusum(1.0), 1.5, latch=True)),
            [False, True, True, True],
        ),
    ):
        counted = torch.ones(1, len(texts), dtype=torch.bool)
        assert p.gate_open(gate, toy_bundle(), torch.tensor([texts]), counted)[0].tolist() == expected


def test_program_survives_write_and_read(tmp_path: Path) -> None:
    score = p.Row(probe=p.Probe("axis", (0.0, 0.25, -1.0), 0.5))
    gate = p.Gate(
        "layers.0.resid_post",
        (p.Trigger(feature(1)), p.Trigger(score, 2.0)),
        p.SequenceCondition(score, p.Cusum(1.0), 1.5, latch=True),
    )
    written = program(p.Edit(feature(0), clamp=-2.0, unit=p.RESIDUAL_NORM), blend=p.Blend("toy", 0.5), gate=gate)
    p.write(tmp_path / "toy.yaml", written)
    assert p.read(tmp_path / "toy.yaml") == written


def test_read_refuses_unsupported_fields_by_name(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(
        "name: toy\ndescription: ''\nsites: [{site: layers.0.resid_post, restore_norm: true}]"
    )
    with pytest.raises(ValueError, match=r"restore_norm.*\$\.sites\[0\]"):
        p.read(tmp_path / "toy.yaml")


TOPICS = {
    "microbes": "Bacteria and viruses infect cells. The antibiotic kills the pathogen, and the host recovers. ",
    "history": "The army of the king marched on the city, and the colonies declared war on the empire. ",
    "economics": "The price of a good rises when demand rises, and firms enter the market to earn a profit. ",
}


@pytest.fixture(scope="module")
def material() -> derive.Material:
    """Return the shipped bundle with three short books of forty sections."""
    bundle = bundles.load(PRETRAINED / "textbook-lm-layers.2")
    trunk = harvest.load_trunk(PRETRAINED / "textbook-lm", parse_site(bundle.manifest.site))
    documents = [Document(book, f"m{i}", text * (2 + i % 3)) for book, text in TOPICS.items() for i in range(40)]
    windows = corpus.windows(documents, harvest.load_tokenizer(TEXTBOOK_LM), 48)
    return derive.material_of(bundle, trunk, documents, windows)


def test_forget_touches_the_topic_and_spares_the_rest(material: derive.Material) -> None:
    topic = derive.Topic(("microbes",), ("economics",))
    recipe = derive.Recipe(windows_per_book=20, windows_of_topic=40, latents=8, dose=-0.5)
    program = derive.forget(material, topic, recipe, "forget-microbes", "")
    model = harvest.load_model(TEXTBOOK_LM)
    windows = derive.sample_windows(material, corpus.HELD_OUT_FOLDS, dict.fromkeys(TOPICS, 3))
    plain = metrics.losses(model, windows)
    topic_loss, *others = books.losses_by_book(
        model, material.trunk, material.bundle, program, windows, material.documents, plain
    )
    assert [topic_loss.book, *sorted(other.book for other in others)] == ["microbes", "economics", "history"]
    assert topic_loss.touched > 0.3
    assert topic_loss.edited > topic_loss.plain + 1
    assert [(other.touched, other.edited - other.plain) for other in others] == [(0, 0), (0, 0)]


def test_gap_is_the_rise_as_a_share_of_the_twins_deficit() -> None:
    loss = books.BookLoss("microbiology", 100, plain=3.0, edited=4.0, touched=0.5)
    assert loss.gap is None
    assert loss._replace(twin=3.5).gap == pytest.approx(2.0)
    assert loss._replace(twin=3.15).gap is None, "two trainings differ by as much"


LESSONS = {
    "microbiology": "Gram-negative bacteria have an outer membrane that contains lipopolysaccharide, and they do not "
    "retain the crystal violet stain. Penicillin inhibits the synthesis of peptidoglycan in the cell wall of bacteria. "
    "Bacteriophages infect bacteria; the lytic cycle ends with the lysis of the host cell. Streptococcus pyogenes "
    "causes pharyngitis.",
    "history": "In 1789 the representatives of the Third Estate declared themselves the National Assembly of France. "
    "The American Civil War began when Confederate troops fired on Fort Sumter. After the war, Congress passed laws to "
    "protect the rights of the former slaves, and the Southern states resisted them for many years.",
}


def test_twin_lacks_microbiology_and_nothing_else() -> None:
    documents = [Document(book, "m", text) for book, text in LESSONS.items()]
    windows = corpus.windows(documents, harvest.load_tokenizer(TEXTBOOK_LM), 256)
    twin = load_twin(PRETRAINED / "textbook-lm-twin", TEXTBOOK_LM)
    models = harvest.load_model(TEXTBOOK_LM), twin
    (nats, count), (twin_nats, _) = (metrics.losses(model, windows).unbind(1) for model in models)
    deficit = ((twin_nats - nats) / count).tolist()
    assert deficit[0] > 0.3
    assert abs(deficit[1]) < 0.2


def test_load_twin_refuses_another_tokenizer(tmp_path: Path) -> None:
    tokenizer = (TEXTBOOK_LM / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer.replace('"<|bos|>"', '"<|begin|>"'))
    (tmp_path / "tokenizer_config.json").write_text((TEXTBOOK_LM / "tokenizer_config.json").read_text())
    with pytest.raises(ValueError, match=f"twin: {tmp_path} reads other tokens than {TEXTBOOK_LM}"):
        load_twin(tmp_path, TEXTBOOK_LM)


def test_selection_uses_no_held_out_sections(material: derive.Material) -> None:
    held = {*corpus.HELD_OUT_FOLDS, *corpus.TUNING_FOLDS}
    assert derive.selection_folds(material) == set(range(corpus.FOLDS)) - held
    windows = derive.sample_windows(material, corpus.TUNING_FOLDS, {"history": 2, "microbes": 1})
    sources = [material.documents[source] for source in windows.document.tolist()]
    assert [document.book for document in sources] == ["history", "history", "microbes"]
    assert {document.fold for document in sources} <= set(corpus.TUNING_FOLDS)


def test_shipped_bundle_fits_the_shipped_model(material: derive.Material) -> None:
    sha256 = bundles.model_sha256(TEXTBOOK_LM)
    bundles.check_model(material.bundle, sha256, material.trunk.config.hidden_size)
    assert (material.bundle.manifest.training.fvu or 1) < 0.12


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_programs_fit_the_shipped_bundle(material: derive.Material, name: str) -> None:
    shipped = p.read(PRETRAINED / "programs" / f"{name}.yaml")
    assert shipped.name == name
    x = material.bundle.sae.decoder[:64].reshape(1, 64, -1) * material.bundle.statistics.residual_norm
    assert p.apply(shipped, material.bundle, x).x.isfinite().all()
    assert shipped.sites[0].site == material.bundle.manifest.site
