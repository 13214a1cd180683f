"""Activations harvested with the engine equal those of transformers, and are written to the same store."""

import asyncio
from pathlib import Path

import pytest
import torch

from rudder.sae_models.activations import corpus, harvest, store
from rudder.sae_models.activations.corpus import Document, Windows
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.activations.store import Content
from rudder.sae_models.activations.stream import TextSource
from rudder.server.engine.engine import Engine
from rudder.server.engine.harvest import EngineSource, capture_windows

SITES = ("layers.1.mlp_out", "layers.2.resid_post", "layers.4.resid_post")


@pytest.fixture(scope="module")
def windows(engine: Engine) -> Windows:
    """Forty windows of three documents; the last of each is short."""
    text = "Cells divide, and viruses need a host. The king may rule a state of free people. " * 12
    documents = [Document("book", f"m{number}", f"{number}. {text}") for number in range(3)]
    return corpus.windows(documents, engine.tokenizer, 24)


async def test_captured_vectors_equal_those_of_transformers(engine: Engine, windows: Windows) -> None:
    vectors = await capture_windows(engine, SITES, windows)
    trunk = harvest.load_trunk(Path(engine.llm.model_config.model), *map(parse_site, SITES))
    live = TextSource(trunk, tuple(map(parse_site, SITES)), windows)
    expected = live.load(range(len(live.chunk_sizes)))
    for at, site in enumerate(SITES):
        ours = torch.cat([window[at] for window in vectors])
        assert ours.shape == expected[site].shape
        assert torch.allclose(ours, expected[site], atol=1e-3 * float(expected[site].abs().max()))


async def test_store_is_written_from_an_engine_source(engine: Engine, windows: Windows, tmp_path: Path) -> None:
    source = EngineSource(engine, SITES, windows, asyncio.get_running_loop())
    content = Content("m", "0", "1", SITES, 24, 0, sum(source.chunk_sizes), "bfloat16")
    written = await asyncio.to_thread(store.write, tmp_path, content, source)
    assert store.load(tmp_path).tokens == written.tokens == int(windows.counted.sum())


async def test_site_without_a_hook_is_refused(engine: Engine, windows: Windows) -> None:
    with pytest.raises(ValueError, match=r"^site: layers\.0\.attn_out is not hooked"):
        await capture_windows(engine, ["layers.0.attn_out"], windows)
