"""Harvests a training run's store out of a running engine, through the hooks that serve.

    rudder harvest RUN.yaml

The store is the one that `rudder train RUN.yaml` would harvest with transformers, and that command finds it whole.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams

from rudder.sae_models.activations import store
from rudder.sae_models.activations.corpus import Windows
from rudder.sae_models.activations.harvest import WINDOWS_A_PASS
from rudder.sae_models.activations.store import Store
from rudder.sae_models.activations.stream import Vectors
from rudder.sae_models.errors import UserError
from rudder.sae_models.training import data
from rudder.sae_models.training.config import Config, ConfigError
from rudder.server import config as configuration
from rudder.server.engine.call import Call
from rudder.server.engine.engine import Engine
from rudder.server.engine.telemetry.frame import column

TRIES = 5


@dataclass(frozen=True)
class Served:
    """Windows as a source (sae_models.training.stream): each chunk is a batch of prompts. To be read in a thread beside
    the engine's loop.
    """

    engine: Engine
    sites: tuple[str, ...]
    windows: Windows
    loop: asyncio.AbstractEventLoop

    @cached_property
    def sizes(self) -> list[int]:
        """Counted tokens of each chunk."""
        return [int(counted.sum()) for counted in self.windows.counted.split(WINDOWS_A_PASS)]

    def load(self, chunks: Sequence[int]) -> Vectors:
        """Runs the prompts."""
        rows = torch.arange(len(self.windows)).split(WINDOWS_A_PASS)
        chosen = self.windows.take(torch.cat([rows[chunk] for chunk in chunks]))
        found = asyncio.run_coroutine_threadsafe(captured(self.engine, self.sites, chosen), self.loop).result()
        return {site: torch.cat([window[at] for window in found]) for at, site in enumerate(self.sites)}


async def captured(engine: Engine, sites: Sequence[str], windows: Windows) -> list[list[Tensor]]:
    """The counted vectors [tokens, d] of each window at each site, before any edit.

    ValueError: a site is not hooked, or a policy would edit what is read.
    """
    hooked = engine.registry.layout.sites
    missing = [site for site in sites if site not in hooked]
    if missing:
        raise UserError(f"site: {missing[0]} is not hooked: name it in engine.sites")
    if engine.policy is not None:
        raise UserError("programs.always: a program that applies to every request would edit what is harvested")
    numbers = [hooked.index(site) for site in sites]
    return list(await asyncio.gather(*(_window(engine, numbers, windows, row) for row in range(len(windows)))))


async def _window(engine: Engine, sites: Sequence[int], windows: Windows, row: int) -> list[Tensor]:
    prompt = tuple(windows.tokens[row][windows.attended[row]].tolist())
    counted = windows.counted[row][: len(prompt)]
    call = Call(
        prompt, SamplingParams(temperature=0.0, max_tokens=1, detokenize=False), report_prompt=True, capture=True
    )
    for _ in range(TRIES):
        outcomes = [output.outcome async for output in engine.stream(call)]
        captures = [capture for outcome in outcomes if outcome for capture in outcome.captures]
        flat = [[column(c.before, "<f4") for c in captures if c.site == site] for site in sites]
        found = [torch.from_numpy(np.concatenate(parts)).view(-1, engine.model.hidden_size) for parts in flat]
        # A request that was preempted computes its tokens again, and they are captured twice. The engine may run one
        # token more than was asked for.
        if all(len(prompt) <= len(x) <= len(prompt) + 1 for x in found):
            return [x[: len(prompt)][counted] for x in found]
    raise UserError(
        f"harvest: a window of {len(prompt)} tokens was preempted {TRIES} times: give the engine more cache"
    )


async def harvest(asked: Config) -> Store:
    """Starts an engine on the run's model, harvests the store, and stops it. ConfigError: the run has no store."""
    if asked.data.store is None:
        raise ConfigError("data.store", "is null: there is no store to write to")
    sites = tuple(map(str, data.sites_of(asked)))
    text = data.read(asked)
    fields = {
        "engine.model": asked.model,
        "engine.bundles": "[]",
        "engine.sites": json.dumps(sites),
        "engine.dtype": "float32",
        "engine.max_model_len": str(asked.window + 1),
        "programs.folder": "null",
    }
    engine = await Engine.start(configuration.load(None, fields))
    try:
        source = data.labelled(asked, text, Served(engine, sites, text.train, asyncio.get_running_loop()))
        content = data.content_of(asked, source)
        return await asyncio.to_thread(store.write, Path(asked.data.store), content, source)
    finally:
        await engine.stop()
