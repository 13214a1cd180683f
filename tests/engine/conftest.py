"""A small engine shared by the tests, and environment variables that must be set before vLLM is imported."""

import os
from collections.abc import AsyncIterator
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest_asyncio
from prometheus_client import REGISTRY

from rudder.server import config as configuration
from rudder.server.engine import selftest
from rudder.server.engine.engine import Engine
from rudder.server.engine.start import start_engine
from tests.engine.device import MEMORY_SHARE, ON_GPU

# 12 blocks of 128 tokens: a few long requests at once are preempted. Steps of 96 tokens: long prompts come in chunks.
KV_BLOCK_BYTES = 128 * 6 * 2 * 6 * 32 * 4
SMALL = {
    "engine.dtype": "float32",
    "engine.enforce_eager": "true",
    "engine.max_model_len": "512",
    "engine.max_num_seqs": "16",
    "engine.max_num_batched_tokens": "96",
    "engine.kv_cache_memory_bytes": str(12 * KV_BLOCK_BYTES),
    "engine.slots": "12",
    "engine.rows": "24",
    "engine.sites": "[layers.1.mlp_out, layers.4.resid_post]",
    "programs.folder": "null",
    "policies.stages": "2",
    "limits.queue": "8",
}
if ON_GPU:
    # With CUDA graphs. Blocks of 16 tokens hold more requests than as many bytes in blocks of 128.
    SMALL |= {
        "engine.enforce_eager": "false",
        "engine.gpu_memory_utilization": str(MEMORY_SHARE),
        "engine.kv_cache_memory_bytes": str(11 * KV_BLOCK_BYTES),
    }


# vLLM's counter of preemptions in the engine below. An engine that starts later replaces it in the registry.
preempted: list[Any] = []


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine() -> AsyncIterator[Engine]:
    """Start the engine on the shipped model in float32, and run its self-test."""
    started = await start_engine(configuration.load(None, SMALL))
    await selftest.run(started)
    preempted.append(REGISTRY._names_to_collectors["vllm:num_preemptions"])
    yield started
    await started.stop()
