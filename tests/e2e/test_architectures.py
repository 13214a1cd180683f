"""A server with a bundle of every architecture: what Inspect tells is the SAE's encode on transformers' activations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.sae import SAE, select
from rudder_client import Client, Feature, Inspection, Program, Report, RudderError
from tests.e2e.architectures import LATENTS, Made, architectures, write
from tests.e2e.conftest import Running, running

MODEL = PRETRAINED / "textbook-lm"
TEXT = "Photosynthesis takes place in the chloroplasts of a leaf. The planets move around the Sun in ellipses. " * 3
SITES = ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")


@torch.inference_mode()
def inputs_of(ids: list[int]) -> dict[str, Tensor]:
    """What every site of the transformers model holds for some tokens, [n, d]."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        seen[name] = (value if isinstance(value, Tensor) else value[0]).reshape(-1, model.config.hidden_size)

    for i, layer in enumerate(model.model.layers):
        for point, module in (("mlp_in", layer.mlp), ("resid_pre", layer)):
            name = f"layers.{i}.{point}"
            module.register_forward_pre_hook(lambda _m, args, name=name: keep(name, args))
        for point, module in (("attn_out", layer.self_attn), ("mlp_out", layer.mlp), ("resid_post", layer)):
            name = f"layers.{i}.{point}"
            module.register_forward_hook(lambda _m, _args, out, name=name: keep(name, out))
    model(torch.tensor([ids]))
    return seen


@pytest.fixture(scope="module")
def ids() -> list[int]:
    from transformers import AutoTokenizer

    found: list[int] = AutoTokenizer.from_pretrained(MODEL)(TEXT).input_ids
    return found


@pytest.fixture(scope="module")
def inputs(ids: list[int]) -> dict[str, Tensor]:
    return inputs_of(ids)


@pytest.fixture(scope="module")
def made(inputs: dict[str, Tensor]) -> dict[str, Made]:
    return {one.name: one for one in architectures({site: x[1:] for site, x in inputs.items()})}


def read(one: Made, inputs: dict[str, Tensor]) -> Tensor:
    """What the SAE reads, [n, d], or [n, L, d]."""
    return inputs[one.sites[0]] if len(one.sites) == 1 else torch.stack([inputs[site] for site in one.sites], -2)


@pytest.fixture(scope="module")
def paths(
    tmp_path_factory: pytest.TempPathFactory, made: dict[str, Made], inputs: dict[str, Tensor]
) -> dict[str, Path]:
    folder: Path = tmp_path_factory.mktemp("bundles")
    model = bundles.Model("textbook-lm", bundles.model_sha256(MODEL), next(iter(inputs.values())).shape[1])
    return {name: write(folder, one, model, read(one, inputs)[1:]) for name, one in made.items()}


def serving(*paths: Path) -> dict[str, str]:
    """Flags of a server with these bundles."""
    return {"engine.bundles": f"[{', '.join(map(str, paths))}]", "programs.folder": "null", "watch": "[]"}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, paths: dict[str, Path]) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server"), **serving(*paths.values())) as server:
        yield server


NAMES = (
    "relu", "jumprelu", "topk", "group_max", "adaptive_k", "layer_norm_topk", "constant_norm_topk", "layer_norm",
    "skip_transcoder", "cross_layer", "route_sae",
)  # fmt: skip


def sure(sae: SAE, x: Tensor) -> Tensor:
    """Where rounding cannot turn an activation on or off, [n, F] bool."""
    noise = [x + 1e-4 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    active = torch.stack([sae.encode(near) > 0 for near in noise])
    return active.all(0) | ~active.any(0)


def agree(told: Tensor, expected: Tensor, certain: Tensor) -> None:
    """Activations agree, and few of them are uncertain."""
    assert certain.float().mean() > 0.97
    assert (expected > 0).float().mean() > 0.03
    torch.testing.assert_close(told[certain], expected[certain], rtol=2e-3, atol=2e-3)


def test_several_saes_are_edited_by_one_program(
    everything: Running, made: dict[str, Made], inputs: dict[str, Tensor], ids: list[int]
) -> None:
    """The second edit stands behind the first: what it touches is counted on the residual that the first has moved."""
    program = Program()
    for name in ("relu", "adaptive_k"):
        latent = int((made[name].sae.encode(read(made[name], inputs))[1:] > 0).sum(0).argmax())
        program = program.at(made[name].sites[0]).clamp(Feature(latent, name), to=0.0)
    with Client(everything.address) as client:
        edits = client.inspect(ids, steer=program, report=Report(top_k=1)).attestation.edits
    assert [edit.site for edit in edits] == ["layers.0.resid_post", "layers.4.resid_post"]
    active = (made["relu"].sae.encode(inputs["layers.0.resid_post"])[1:] > 0).sum(0).max()
    assert edits[0].tokens_touched == int(active)
    assert 0 < edits[1].tokens_touched < len(ids)


def test_what_a_bundle_allows_is_told(everything: Running) -> None:
    with Client(everything.address) as client:
        told = {bundle.name: bundle for bundle in client.model().bundles}
    assert (told["topk"].activation, told["topk"].editable) == ("top_k", True)
    assert (told["skip_transcoder"].output_site, told["skip_transcoder"].editable) == ("layers.1.mlp_out", False)
    assert "writes to many layers" in told["cross_layer"].not_editable_because
    assert "ask for its strongest" in told["route_sae"].not_editable_because
    assert not told["relu"].HasField("fvu")


def activations_of(inspection: Inspection) -> Tensor:
    """What was told, [n, F]."""
    told = torch.zeros(len(inspection.tokens), LATENTS)
    for token in inspection.tokens:
        for activation in token.activations:
            told[token.position, activation.feature.index] = activation.value
    return told


@pytest.mark.parametrize("name", NAMES)
def test_the_strongest_features_are_the_encode(
    name: str, everything: Running, made: dict[str, Made], inputs: dict[str, Tensor], ids: list[int]
) -> None:
    one = made[name]
    x = read(one, inputs)
    with Client(everything.address) as client:
        inspection = client.inspect(ids, report=Report(top_k=LATENTS, sites=[one.sites[0]]))
    assert {activation.feature.bundle for token in inspection.tokens for activation in token.activations} == {name}
    told = activations_of(inspection)
    agree(told[1:], one.sae.encode(x)[1:], sure(one.sae, x)[1:])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "route_sae"])
def test_named_features_are_the_encode(
    name: str, everything: Running, made: dict[str, Made], inputs: dict[str, Tensor], ids: list[int]
) -> None:
    one, chosen = made[name], list(range(0, LATENTS, 3))
    x = read(one, inputs)
    with Client(everything.address) as client:
        inspection = client.inspect(ids, report=Report(features={one.sites[0]: chosen}))
    told = activations_of(inspection)
    agree(told[1:, chosen], one.sae.encode(x)[1:, chosen], sure(one.sae, x)[1:, chosen])


@pytest.mark.parametrize("name", ["topk", "group_max", "adaptive_k", "layer_norm_topk", "layer_norm"])
def test_latents_of_a_selection_are_edited_where_they_are_kept(
    name: str, everything: Running, made: dict[str, Made], inputs: dict[str, Tensor], ids: list[int]
) -> None:
    one = made[name]
    x = read(one, inputs)
    active = one.sae.encode(x)[1:] > 0
    latent = int(active.sum(0).argmax())
    program = Program().at(one.sites[0]).clamp(Feature(latent, name), to=0.0)
    with Client(everything.address) as client:
        attestation = client.inspect(ids, steer=program, report=Report(top_k=1)).attestation
    touched = attestation.edits[0].tokens_touched
    assert abs(touched - int(active[:, latent].sum())) <= int((~sure(one.sae, x)[1:, latent]).sum())
    assert 0 < touched < len(ids) - 1


def test_selection_and_normalisation_inside_the_compiled_graph(
    tmp_path: Path, paths: dict[str, Path], made: dict[str, Made], inputs: dict[str, Tensor], ids: list[int]
) -> None:
    one, chosen = made["layer_norm_topk"], list(range(0, LATENTS, 3))
    x = read(one, inputs)
    compiled = serving(paths["layer_norm_topk"], paths["adaptive_k"]) | {"engine.enforce_eager": "false"}
    with running(tmp_path, **compiled) as server, Client(server.address) as client:
        inspection = client.inspect(ids, report=Report(features={one.sites[0]: chosen}))
    told = activations_of(inspection)
    agree(told[1:, chosen], one.sae.encode(x)[1:, chosen], sure(one.sae, x)[1:, chosen])


@pytest.mark.parametrize(("name", "site"), [("skip_transcoder", "layers.1.mlp_in"), ("cross_layer", "layers.3.mlp_in")])
def test_a_transcoder_is_watched_and_not_edited(name: str, site: str, everything: Running) -> None:
    program = Program().at(site).set(Feature(3, name), to=1.0)
    with Client(everything.address) as client, pytest.raises(RudderError, match=r"it can be watched, not edited"):
        client.complete("A", steer=program)


def test_latents_of_a_routed_sae_have_no_rows(everything: Running) -> None:
    with Client(everything.address) as client, pytest.raises(RudderError, match=r"ask for its strongest latents"):
        client.inspect("A", report=Report(features={"layers.1.resid_pre": [3]}))


def test_the_selection_is_what_makes_the_difference(made: dict[str, Made], inputs: dict[str, Tensor]) -> None:
    one = made["topk"].sae
    z = one.preactivations(read(made["topk"], inputs)).relu()
    assert one.selection is not None
    assert ((z > 0) != (select(one.selection, z, z) > 0)).float().mean() > 0.1
