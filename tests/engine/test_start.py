"""What stops a start: an unknown model layout, a bank that fails its self-test, a compiled artifact of another bank."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vllm import SamplingParams

from rudder.sae_models.activations.layers import UnknownLayout
from rudder.sae_models.activations.measure import measure
from rudder.server import config as configuration
from rudder.server.config import Config, ConfigError
from rudder.server.engine import selftest
from rudder.server.engine.adapter import engine_args, resolve
from rudder.server.engine.call import Call
from rudder.server.engine.engine import Engine
from rudder.server.engine.supported import check_supported
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.engine.traced import code_digest
from rudder.server.engine.worker import hooks as sites
from rudder.server.program.layout import Layout
from tests.engine.conftest import SMALL


class UnknownModel(nn.Module):
    """A model whose layers are no decoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.more = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])


def test_unknown_model_layout_is_refused_by_name() -> None:
    model = UnknownModel()
    with pytest.raises(UnknownLayout, match="UnknownModel has 2 lists of 2 layers"):
        sites.decoder_layers(model, 2)
    with pytest.raises(UnknownLayout, match=r"layers\.7\.resid_post of a model with 2 layers"):
        sites.layer_numbers(["layers.7.resid_post"], model.layers)
    with pytest.raises(UnknownLayout, match="Linear takes no hidden_states"):
        measure(model.layers, [0], 4, 8, lambda: None)


def test_fused_residual_is_read_as_a_sum() -> None:
    seen = []

    class Probe(nn.Module):
        width = 8

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return torch.ones_like(x)

    hidden, residual = torch.randn(3, 8), torch.randn(3, 8)
    edited, unchanged = sites.output_hook(Probe(), is_sum=True)(nn.Identity(), (), (hidden, residual))  # type: ignore[arg-type]
    torch.testing.assert_close(seen[0], hidden + residual)
    torch.testing.assert_close(edited, hidden + 1)
    assert unchanged is residual


@pytest.mark.parametrize(
    "change", [{"rows": 32}, {"slots": 9}, {"sites": ("layers.1.mlp_out",)}, {"stages": 2}, {"window": 8}]
)
def test_compile_cache_key_depends_on_the_layout(change: dict[str, Any]) -> None:
    from vllm.config import VllmConfig

    layout = Layout(("layers.2.resid_post",), rows=16, slots=8)

    def key(config: dict[str, Any]) -> str:
        return str(VllmConfig(additional_config=config).compute_hash())

    ours = key(layout.additional_config(code_digest()))
    assert ours != key({}), "an artifact without hooks must not be used with them"
    assert ours != key(replace(layout, **change).additional_config(code_digest()))
    assert ours == key(layout.additional_config(code_digest()))


def test_compile_cache_key_depends_on_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(("layers.2.resid_post",))
    before = layout.additional_config(code_digest())
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b"#")
    assert layout.additional_config(code_digest()) != before


def test_speculators_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    """vLLM turns on speculative decoding by itself where the checkpoint's configuration asks for it."""
    shipped = Path(Config().engine.model or "")
    folder = tmp_path / "drafter"
    folder.mkdir()
    content = json.loads((shipped / "config.json").read_text())
    verifier = {"name_or_path": str(shipped), "architectures": content["architectures"]}
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3}
    speculators = {"algorithm": "eagle3", "proposal_methods": [proposal], "verifier": verifier}
    drafter = content | {"speculators_model_type": "eagle3", "transformer_layer_config": content}
    drafter |= {"draft_vocab_size": content["vocab_size"], "speculators_config": speculators}
    (folder / "config.json").write_text(json.dumps(drafter))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((shipped / name).read_bytes())
    plain = configuration.load(None, SMALL)
    check_supported(resolve(engine_args(plain, Layout(("layers.2.resid_post",)))))
    changed = configuration.load(None, SMALL | {"engine.model": str(folder)})
    with pytest.raises(ConfigError, match=r"^engine\.model: vLLM resolved speculative_config to .*\(eagle3\)"):
        check_supported(resolve(engine_args(changed, Layout(("layers.2.resid_post",)))))


async def test_bank_that_does_not_edit_fails_the_self_test(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = engine.stream

    async def unsteered(call: Call) -> Any:
        async for output in stream(replace(call, compiled=None)):
            moved = (12,) * len(call.compiled.edits) if call.compiled else ()
            yield output._replace(outcome=output.outcome and replace(output.outcome, moved=moved))

    monkeypatch.setattr(engine, "stream", unsteered)
    engine.self_tested = False
    with pytest.raises(selftest.SelfTestFailed, match="the edit equals the reference"):
        await selftest.run(engine)
    assert not engine.healthy
    monkeypatch.undo()
    await selftest.run(engine)
    assert engine.healthy


async def test_hook_that_did_not_run_fails_the_self_test(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = engine.stream

    async def without_captures(call: Call) -> Any:
        async for output in stream(call):
            yield output._replace(outcome=output.outcome and replace(output.outcome, captures=()))

    monkeypatch.setattr(engine, "stream", without_captures)
    with pytest.raises(selftest.SelfTestFailed, match="its hook did not run"):
        await selftest.run(engine)
    monkeypatch.undo()
    await selftest.run(engine)


async def test_lost_telemetry_fails_every_call(engine: Engine) -> None:
    engine.hub.lost = TelemetryLost("a gap")
    with pytest.raises(TelemetryLost):
        await anext(engine.stream(Call((1, 5, 9), SamplingParams(max_tokens=4, ignore_eos=True))))
    assert not engine.healthy
    engine.hub.lost = None
    assert engine.healthy
