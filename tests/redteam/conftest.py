"""One server for all attacks, and environment variables that must be set before vLLM is imported."""

import os
from collections.abc import AsyncIterator

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest_asyncio

from rudder.server.bench.redteam import material
from rudder.server.bench.redteam import target as targets
from rudder.server.bench.redteam.target import Target


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def target() -> AsyncIterator[Target]:
    """Start an engine on the demo model, and run its self-test."""
    started = await targets.start(material.load())
    yield started
    await started.stop()
