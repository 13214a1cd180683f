"""A server with a bundle of every architecture: Inspect agrees with SAE.encode on the activations of transformers."""

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
from tests.e2e.architectures import LATENTS, Case, architectures, write
from tests.e2e.conftest import Running, running

MODEL = PRETRAINED / "textbook-lm"
TEXT = "Photosynthesis takes place in the chloroplasts of a leaf. The planets move around the Sun in ellipses. " * 3
SITES = ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")


@torch.inference_mode()
def inputs_of(ids: list[int]) -> dict[str, Tensor]:
    """Capture the activations [n, d] of the transformers model at every site."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    outputs: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        outputs[name] = (value if isinstance(value, Tensor) else value[0]).reshape(-1, model.config.hidden_size)

    for i, layer in enumerate(model.model.layers):
        for point, module in (("mlp_in", layer.mlp), ("resid_pre", layer)):
            name = f"layers.{i}.{point}"
            module.register_forward_pre_hook(lambda _m, args, name=name: keep(name, args))
        for point, module in (("attn_out", layer.self_attn), ("mlp_out", layer.mlp), ("resid_post", layer)):
            name = f"layers.{i}.{point}"
            module.register_forward_hook(lambda _m, _args, out, name=name: keep(name, out))
    model(torch.tensor([ids]))
    return outputs


@pytest.fixture(scope="module")
def ids() -> list[int]:
    from transformers import AutoTokenizer

    token_ids: list[int] = AutoTokenizer.from_pretrained(MODEL)(TEXT).input_ids
    return token_ids


@pytest.fixture(scope="module")
def inputs(ids: list[int]) -> dict[str, Tensor]:
    return inputs_of(ids)


@pytest.fixture(scope="module")
def cases(inputs: dict[str, Tensor]) -> dict[str, Case]:
    return {case.name: case for case in architectures({site: x[1:] for site, x in inputs.items()})}


def read(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """Select the input of an SAE, [n, d], or [n, L, d] for several sites."""
    return inputs[case.sites[0]] if len(case.sites) == 1 else torch.stack([inputs[site] for site in case.sites], -2)


@pytest.fixture(scope="module")
def paths(
    tmp_path_factory: pytest.TempPathFactory, cases: dict[str, Case], inputs: dict[str, Tensor]
) -> dict[str, Path]:
    folder: Path = tmp_path_factory.mktemp("bundles")
    model = bundles.Model("textbook-lm", bundles.model_sha256(MODEL), next(iter(inputs.values())).shape[1])
    return {name: write(folder, case, model, read(case, inputs)[1:]) for name, case in cases.items()}


def serving(*paths: Path) -> dict[str, str]:
    """Overrides of a server with these bundles."""
    return {"engine.bundles": f"[{', '.join(map(str, paths))}]", "programs.folder": "null", "watch": "[]"}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, paths: dict[str, Path]) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server"), **serving(*paths.values())) as server:
        yield server


NAMES = (
    "relu", "jumprelu", "topk", "group_max", "adaptive_k", "layer_norm_topk", "constant_norm_topk", "layer_norm",
    "skip_transcoder", "cross_layer", "route_sae",
)  # fmt: skip


def is_certain(sae: SAE, x: Tensor) -> Tensor:
    """Find where rounding cannot turn an activation on or off, [n, F] bool."""
    noise = [x + 1e-4 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    active = torch.stack([sae.encode(near) > 0 for near in noise])
    return active.all(0) | ~active.any(0)


def agree(reported: Tensor, expected: Tensor, certain: Tensor) -> None:
    """Assert that activations agree where they are certain, and that few are uncertain."""
    assert certain.float().mean() > 0.97
    assert (expected > 0).float().mean() > 0.03
    torch.testing.assert_close(reported[certain], expected[certain], rtol=2e-3, atol=2e-3)


def test_one_program_edits_several_saes(
    everything: Running, cases: dict[str, Case], inputs: dict[str, Tensor], ids: list[int]
) -> None:
    """The second edit reads the residual stream that the first has changed."""
    program = Program()
    for name in ("relu", "adaptive_k"):
        latent = int((cases[name].sae.encode(read(cases[name], inputs))[1:] > 0).sum(0).argmax())
        program = program.at(cases[name].sites[0]).clamp(Feature(latent, name), to=0.0)
    with Client(everything.address) as client:
        edits = client.inspect(ids, steer=program, report=Report(top_k=1)).attestation.edits
    assert [edit.site for edit in edits] == ["layers.0.resid_post", "layers.4.resid_post"]
    active = (cases["relu"].sae.encode(inputs["layers.0.resid_post"])[1:] > 0).sum(0).max()
    assert edits[0].tokens_touched == int(active)
    assert 0 < edits[1].tokens_touched < len(ids)


def test_model_reports_which_bundles_are_editable(everything: Running) -> None:
    with Client(everything.address) as client:
        reported = {bundle.name: bundle for bundle in client.model().bundles}
    assert (reported["topk"].activation, reported["topk"].editable) == ("top_k", True)
    assert (reported["skip_transcoder"].output_site, reported["skip_transcoder"].editable) == (
        "layers.1.mlp_out",
        False,
    )
    assert "writes to many layers" in reported["cross_layer"].not_editable_because
    assert "ask for its strongest" in reported["route_sae"].not_editable_because
    assert not reported["relu"].HasField("fvu")


def activations_of(inspection: Inspection) -> Tensor:
    """Convert reported activations to a tensor [n, F]."""
    reported = torch.zeros(len(inspection.tokens), LATENTS)
    for token in inspection.tokens:
        for activation in token.activations:
            reported[token.position, activation.feature.index] = activation.value
    return reported


@pytest.mark.parametrize("name", NAMES)
def test_top_k_features_equal_sae_encode(
    name: str, everything: Running, cases: dict[str, Case], inputs: dict[str, Tensor], ids: list[int]
) -> None:
    case = cases[name]
    x = read(case, inputs)
    with Client(everything.address) as client:
        inspection = client.inspect(ids, report=Report(top_k=LATENTS, sites=[case.sites[0]]))
    assert {activation.feature.bundle for token in inspection.tokens for activation in token.activations} == {name}
    reported = activations_of(inspection)
    agree(reported[1:], case.sae.encode(x)[1:], is_certain(case.sae, x)[1:])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "route_sae"])
def test_named_features_equal_sae_encode(
    name: str, everything: Running, cases: dict[str, Case], inputs: dict[str, Tensor], ids: list[int]
) -> None:
    case, chosen = cases[name], list(range(0, LATENTS, 3))
    x = read(case, inputs)
    with Client(everything.address) as client:
        inspection = client.inspect(ids, report=Report(features={case.sites[0]: chosen}))
    reported = activations_of(inspection)
    agree(reported[1:, chosen], case.sae.encode(x)[1:, chosen], is_certain(case.sae, x)[1:, chosen])


@pytest.mark.parametrize("name", ["topk", "group_max", "adaptive_k", "layer_norm_topk", "layer_norm"])
def test_latents_are_edited_where_the_selection_keeps_them(
    name: str, everything: Running, cases: dict[str, Case], inputs: dict[str, Tensor], ids: list[int]
) -> None:
    case = cases[name]
    x = read(case, inputs)
    active = case.sae.encode(x)[1:] > 0
    latent = int(active.sum(0).argmax())
    program = Program().at(case.sites[0]).clamp(Feature(latent, name), to=0.0)
    with Client(everything.address) as client:
        attestation = client.inspect(ids, steer=program, report=Report(top_k=1)).attestation
    touched = attestation.edits[0].tokens_touched
    assert abs(touched - int(active[:, latent].sum())) <= int((~is_certain(case.sae, x)[1:, latent]).sum())
    assert 0 < touched < len(ids) - 1


@pytest.mark.long
def test_selection_and_normalisation_inside_the_compiled_graph(
    tmp_path: Path, paths: dict[str, Path], cases: dict[str, Case], inputs: dict[str, Tensor], ids: list[int]
) -> None:
    case, chosen = cases["layer_norm_topk"], list(range(0, LATENTS, 3))
    x = read(case, inputs)
    compiled = serving(paths["layer_norm_topk"], paths["adaptive_k"]) | {"engine.enforce_eager": "false"}
    with running(tmp_path, **compiled) as server, Client(server.address) as client:
        inspection = client.inspect(ids, report=Report(features={case.sites[0]: chosen}))
    reported = activations_of(inspection)
    agree(reported[1:, chosen], case.sae.encode(x)[1:, chosen], is_certain(case.sae, x)[1:, chosen])


@pytest.mark.parametrize(("name", "site"), [("skip_transcoder", "layers.1.mlp_in"), ("cross_layer", "layers.3.mlp_in")])
def test_transcoder_can_be_watched_but_not_edited(name: str, site: str, everything: Running) -> None:
    program = Program().at(site).set(Feature(3, name), to=1.0)
    with Client(everything.address) as client, pytest.raises(RudderError, match=r"it can be watched, not edited"):
        client.complete("A", steer=program)


def test_routed_sae_has_no_rows_to_report_by_name(everything: Running) -> None:
    with Client(everything.address) as client, pytest.raises(RudderError, match=r"ask for its strongest latents"):
        client.inspect("A", report=Report(features={"layers.1.resid_pre": [3]}))


def test_selection_changes_which_latents_are_active(cases: dict[str, Case], inputs: dict[str, Tensor]) -> None:
    case = cases["topk"].sae
    z = case.preactivations(read(cases["topk"], inputs)).relu()
    assert case.selection is not None
    assert ((z > 0) != (select(case.selection, z, z) > 0)).float().mean() > 0.1
