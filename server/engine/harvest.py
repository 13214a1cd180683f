"""Harvest the activation store of a training run with the engine, through the hooks that serve.

    rudder harvest RUN.yaml

The store equals the one that `rudder train RUN.yaml` harvests with transformers, and that command uses it.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rudder.sae_models.activations.corpus import Windows
from rudder.sae_models.activations.harvest import WINDOWS_PER_PASS
from rudder.sae_models.activations.store import Store
from rudder.sae_models.activations.stream import Vectors
from rudder.sae_models.errors import UserError
from rudder.sae_models.training import data
from rudder.sae_models.training.config import Config
from rudder.server import config as configuration
from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call
from rudder.server.engine.engine import Engine
from rudder.server.engine.start import start_engine
from rudder.server.engine.telemetry.frame import column

MAX_ATTEMPTS = 5


@dataclass(frozen=True)
class EngineSource:
    """A source of activations (sae_models.activations.stream) whose chunks are batches of windows, run as prompts.

    Call `load` from a thread other than that of `loop`, on which the engine runs.
    """

    engine: Engine
    sites: tuple[str, ...]
    windows: Windows
    loop: asyncio.AbstractEventLoop

    @cached_property
    def chunk_sizes(self) -> list[int]:
        """Number of counted tokens of each chunk."""
        return [int(self.windows.counted[index].sum()) for index in self.windows.chunks(WINDOWS_PER_PASS)]

    def load(self, chunks: Sequence[int]) -> Vectors:
        """Run the windows of `chunks`; return the vectors [tokens, d] of each site."""
        numbers = self.windows.chunks(WINDOWS_PER_PASS)
        windows = self.windows.take(torch.cat([numbers[chunk] for chunk in chunks]))
        run = asyncio.run_coroutine_threadsafe(capture_windows(self.engine, self.sites, windows), self.loop)
        vectors = run.result()
        return {site: torch.cat([window[at] for window in vectors]) for at, site in enumerate(self.sites)}


async def capture_windows(engine: Engine, sites: Sequence[str], windows: Windows) -> list[list[Tensor]]:
    """Return the residuals [tokens, d] of the counted tokens of each window at each site. Nothing edits them.

    Raises ValueError if a site is not hooked.
    """
    hooked = engine.registry.layout.sites
    missing = [site for site in sites if site not in hooked]
    if missing:
        raise UserError(f"site: {missing[0]} is not hooked: name it in engine.sites")
    numbers = [hooked.index(site) for site in sites]
    # Admission refuses windows that would wait in vLLM beyond its bound.
    running = asyncio.Semaphore(min(WINDOWS_PER_PASS, int(engine.admission.running)))

    async def capture(index: int) -> list[Tensor]:
        async with running:
            return await _capture_window(engine, numbers, windows, index)

    return list(await asyncio.gather(*map(capture, range(len(windows)))))


async def _capture_window(engine: Engine, sites: Sequence[int], windows: Windows, index: int) -> list[Tensor]:
    prompt = tuple(windows.tokens[index][windows.attention_mask[index]].tolist())
    counted = windows.counted[index][: len(prompt)]
    call = Call(prompt, SamplingParams(temperature=0.0, max_tokens=1, detokenize=False), capture=True)
    for _ in range(MAX_ATTEMPTS):
        outcomes = [output.outcome async for output in engine.stream(call)]
        captures = [capture for outcome in outcomes if outcome for capture in outcome.captures]
        flat = [[column(c.before, "<f4") for c in captures if c.site == site] for site in sites]
        vectors = [torch.from_numpy(np.concatenate(parts)).view(-1, engine.model.hidden_size) for parts in flat]
        # A preempted request computes its tokens again, and they are captured twice. An asynchronous scheduler may run
        # one token more than requested.
        if all(len(prompt) <= len(x) <= len(prompt) + 1 for x in vectors):
            return [x[: len(prompt)][counted] for x in vectors]
    raise UserError(
        f"harvest: a window of {len(prompt)} tokens was preempted {MAX_ATTEMPTS} times: give the engine more cache"
    )


async def harvest(config: Config) -> Store:
    """Start an engine on the model of a training run, harvest the run's store, and stop the engine.

    Raises CorpusError, StoreError, ValueError, OSError.
    """
    sites = tuple(map(str, data.run_sites(config)))
    text = data.load_windows(config)
    fields = {
        "engine.model": config.model,
        "engine.bundles": "[]",
        "engine.sites": json.dumps(sites),
        "engine.dtype": "float32",
        "engine.max_model_len": str(config.window + 1),
        "programs.folder": "null",
        "policies.folder": "null",
    }
    engine = await start_engine(configuration.load(None, fields))
    try:
        loop = asyncio.get_running_loop()
        held_out = text.held_out.first(config.evaluation.tokens)
        inputs = data.TrainingInputs(
            data.with_complexities(config, text, EngineSource(engine, sites, text.train, loop)),
            EngineSource(engine, sites, held_out, loop),
            *data.model_of(config),
        )
        return (await asyncio.to_thread(data.harvest_stores, config, inputs))[0]
    finally:
        await engine.stop()
