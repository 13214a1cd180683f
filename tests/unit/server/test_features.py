"""What the catalogue holds of a latent reaches the message of FeatureService and the output of `rudder features`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rudder.sae_models.bundle import catalogue
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.bundle.catalogue import Catalogue, Context, Latent, Neighbour, Summary
from rudder.server.cli.features import features_table, print_feature
from rudder.server.cli.output import out
from rudder.server.config import Limits
from rudder.server.service import catalogue as service
from rudder.server.service.errors import Refusal
from rudder.server.service.limits import bounds_of
from rudder.server.service.serving import Serving
from rudder.v1 import catalogue_pb2

SCORED = Latent(
    Summary(0, "virus; near [host]", 0.25, 3.5, "corpus", 0.875, 0.125, 0.75, 0.5, 0.25),
    ("virus",),
    (
        Context("the ", "virus", " spreads", 3.5, "biology"),
        Context("a ", "viral", " load", 1.5, "biology", held_out=True),
    ),
    neighbours=(Neighbour(2, 0.5), Neighbour(1, 0.25)),
)
LATENTS = (
    SCORED,
    Latent(Summary(1, "", 0.5, 1.0, "", 0.5, 0.1), (), ()),
    Latent(Summary(2, "star", None, None), (), ()),
)


@pytest.fixture
def details(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that reads a feature through the service."""
    catalogue.write(tmp_path / "c.sqlite", LATENTS)
    manifest = SimpleNamespace(name="toy", site="layers.2.resid_post", latents=len(LATENTS))
    bundle = cast(Bundle, SimpleNamespace(manifest=manifest, catalogue=Catalogue(tmp_path / "c.sqlite")))
    monkeypatch.setattr(service, "requested_bundle", lambda *_: bundle)

    async def get(index: int) -> catalogue_pb2.FeatureDetail:
        request = catalogue_pb2.FeatureServiceGetRequest(index=index)
        reply = await service.get_feature(cast(Serving, SimpleNamespace(engine=None)), request)
        return reply.feature

    yield get
    bundle.catalogue.close()


async def search(**fields: Any) -> list[int]:
    """Search the catalogue of `details`."""
    serving = cast(Serving, SimpleNamespace(engine=None, bounds=bounds_of(Limits(), 100, 100)))
    reply = await service.search_features(serving, catalogue_pb2.FeatureServiceSearchRequest(**fields))
    return [feature.index for feature in reply.features]


@pytest.mark.usefixtures("details")
async def test_a_search_for_steering_needs_output_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await search(query="virus", for_steering=True) == [0]
    monkeypatch.setattr(Catalogue, "has_output_scores", False)
    assert await search(query="virus") == [0]
    with pytest.raises(Refusal, match="for_steering: toy has no output scores"):
        await search(query="virus", for_steering=True)


async def test_message_has_scores_held_out_contexts_and_neighbours(details: Any) -> None:
    detail = await details(0)
    summary = detail.summary
    assert (summary.label_score, summary.label_error, summary.intervention) == (0.875, 0.125, 0.75)
    assert (summary.output_score, summary.input_score) == (0.5, 0.25)
    assert [context.held_out for context in detail.contexts] == [False, True]
    assert [(near.index, near.label, near.cosine) for near in detail.neighbours] == [(2, "star", 0.5), (1, "", 0.25)]


async def test_message_has_no_scores_where_nobody_measured(details: Any) -> None:
    summary = (await details(2)).summary
    assert not any(summary.HasField(name) for name in ("label_score", "intervention", "output_score", "input_score"))


async def test_command_prints_all_of_a_feature(details: Any) -> None:
    with out.capture() as printed:
        print_feature(await details(0))
    text = printed.get()
    assert "virus; near [host]  feature 0 of toy" in text
    assert "from corpus; picks out held-out contexts with score 0.88 ± 0.12 (chance 0.5)" in text
    assert "adding it raises the label's words above 75% of the vocabulary" in " ".join(text.split())
    assert "near feature 2, cosine 0.50: star" in text
    assert "near feature 1, cosine 0.25: no label" in text
    assert "the «virus» spreads" in text
    assert "held out" in text.split("viral")[1]


async def test_command_says_that_there_is_no_label(details: Any) -> None:
    with out.capture() as printed:
        print_feature(await details(1))
        out.print(features_table([(await details(1)).summary, (await details(2)).summary]))
    text = printed.get()
    assert "no label  feature 1 of toy" in text
    assert "the best label picks out held-out contexts with score 0.50" in text
    rows = [line for line in text.splitlines() if line.startswith(("│ 1", "│ 2"))]
    assert "no label" in rows[0]
    assert "star" in rows[1]
