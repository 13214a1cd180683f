"""What the server process tells vLLM: the dtype that is fast, the device; and how a failed start is reported."""

from typing import Any

import pytest
from vllm.platforms import current_platform
from vllm.utils.system_utils import get_mp_context
from vllm.v1.engine.core import EngineCoreProc

from rudder.sae_models.errors import UserError
from rudder.server.config import Config, ConfigError
from rudder.server.config import Engine as EngineConfig
from rudder.server.engine import adapter
from rudder.server.engine.adapter import EngineStartError, engine_args, resolved_dtype, runs_on_cpu
from rudder.server.engine.parent import Target
from rudder.server.program.layout import Layout

LAYOUT = Layout(("layers.1.resid_post",))


@pytest.mark.parametrize(("fast", "dtype"), [("float32", "float32"), ("bfloat16", "auto")])
def test_automatic_dtype_is_the_one_that_is_fast_on_the_cpu(
    fast: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "fast_precision", lambda _: fast)
    resolved, reason = resolved_dtype("auto", on_cpu=True)
    assert resolved == dtype
    assert ("no matrix unit for bfloat16" in reason) == (dtype == "float32")
    assert resolved_dtype("auto", on_cpu=False)[0] == "auto"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_configured_dtype_is_kept(dtype: str) -> None:
    assert resolved_dtype(dtype, on_cpu=True) == (dtype, "as configured")


def test_vllm_gets_the_resolved_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "fast_precision", lambda _: "float32")
    monkeypatch.setattr(adapter, "runs_on_cpu", lambda _: True)
    assert engine_args(Config(), LAYOUT).dtype == "float32"


@pytest.mark.skipif(not current_platform.is_cpu(), reason="of the CPU build")
def test_device_that_vllm_does_not_have_is_named() -> None:
    assert runs_on_cpu("auto")
    assert runs_on_cpu("cpu")
    with pytest.raises(ConfigError, match=r"^engine\.device: cuda: the installed vLLM runs on cpu"):
        engine_args(Config(engine=EngineConfig(device="cuda")), LAYOUT)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that starts an engine whose start does what `failing` does."""

    def run(failing: Any) -> Any:
        class FakeLLM:
            @staticmethod
            def from_vllm_config(_: Any, **__: Any) -> None:
                failing(EngineCoreProc.run_engine_core)

        monkeypatch.setattr(adapter, "AsyncLLM", FakeLLM)
        monkeypatch.setattr(adapter, "resolve", lambda _: None)
        monkeypatch.setattr(adapter, "check_supported", lambda _: None)
        return adapter.start_engine_process(engine_args(Config(), LAYOUT))

    return run


def test_error_of_the_engine_process_is_the_error_of_the_start(start: Any) -> None:
    original = EngineCoreProc.__dict__["run_engine_core"]

    def failing(target: Target) -> None:
        def out_of_memory() -> None:
            raise MemoryError("cannot allocate\n8 GiB")

        target.function = out_of_memory
        with pytest.raises(MemoryError):
            target()
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    with pytest.raises(EngineStartError, match=r"^the engine did not start: MemoryError: cannot allocate 8 GiB$"):
        start(failing)
    assert EngineCoreProc.__dict__["run_engine_core"] is original


def test_engine_process_that_was_killed_is_reported(start: Any) -> None:
    def failing(_: Target) -> None:
        raise RuntimeError("Engine core initialization failed. Failed core proc(s): {'EngineCore': -9}")

    with pytest.raises(EngineStartError, match="-9"):
        start(failing)


def test_engine_process_is_not_forked(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked process has the state of this one's OpenMP threads, and waits for them for ever."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    methods = []

    def look(_: Target) -> None:
        methods.append(get_mp_context().get_start_method())
        raise RuntimeError("Engine core initialization failed.")

    with pytest.raises(EngineStartError):
        start(look)
    assert methods == ["spawn"]


def test_vllm_s_refusal_is_an_error_of_the_user_and_a_bug_is_not(start: Any) -> None:
    def refused(_: Target) -> None:
        raise ValueError("max_model_len")

    def bug(_: Target) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(UserError, match=r"^vLLM: max_model_len"):
        start(refused)
    with pytest.raises(RuntimeError, match="a bug"):
        start(bug)


async def test_error_of_a_worker_s_method_is_the_error_of_the_start() -> None:
    class FakeLLM:
        async def collective_rpc(self, method: str, args: Any) -> None:  # noqa: ARG002
            raise Exception(f"Call to {method} method failed: CUDA out of memory")

    with pytest.raises(EngineStartError, match="rudder_bundles method failed: CUDA out of memory"):
        await adapter.call_workers(FakeLLM(), "rudder_bundles", {})
