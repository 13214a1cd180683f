"""Start engines with a worker class of the tests in place of Rudder's own."""

from dataclasses import replace

import pytest

from rudder.server.engine import adapter, supported


def use_worker(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let engines start with the worker class `name`, which their check of vLLM's configuration would refuse."""
    args = adapter.engine_args
    others = tuple(check for check in supported.CHECKS if check[0] != "parallel_config.worker_cls")
    patch.setattr(supported, "CHECKS", others)
    patch.setattr(adapter, "engine_args", lambda *a: replace(args(*a), worker_cls=name))
