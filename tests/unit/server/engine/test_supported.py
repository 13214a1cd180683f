"""Settings that vLLM resolved and Rudder does not support are refused by name."""

from types import SimpleNamespace
from typing import Any

import pytest

from rudder.server.config import ConfigError
from rudder.server.engine.supported import CHECKS, check_supported

PLAIN: dict[str, Any] = {
    "speculative_config": None,
    "parallel_config.pipeline_parallel_size": 1,
    "parallel_config.data_parallel_size": 1,
    "parallel_config.use_ubatching": False,
    "parallel_config.worker_cls": "rudder.server.engine.worker.cpu.Worker",
    "compilation_config.pass_config.enable_sp": False,
    "model_config.runner_type": "generate",
    "model_config.is_encoder_decoder": False,
    "model_config.enable_prompt_embeds": False,
    "cache_config.kv_sharing_fast_prefill": False,
    "kv_transfer_config": None,
    "lora_config": None,
}


def resolved(**changes: Any) -> Any:
    """A resolved configuration with these settings, dots written as __."""
    root = SimpleNamespace()
    for path, value in (PLAIN | {name.replace("__", "."): value for name, value in changes.items()}).items():
        *parents, name = path.split(".")
        holder = root
        for parent in parents:
            if not hasattr(holder, parent):
                setattr(holder, parent, SimpleNamespace())
            holder = getattr(holder, parent)
        setattr(holder, name, value)
    return root


def test_what_rudder_supports_passes() -> None:
    check_supported(resolved())
    check_supported(resolved(parallel_config__tensor_parallel_size=2, compilation_config__pass_config__enable_sp=None))


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("speculative_config", SimpleNamespace(method="eagle3"), r"SimpleNamespace \(eagle3\): speculative decoding"),
        ("parallel_config__pipeline_parallel_size", 2, "2: each worker"),
        ("parallel_config__data_parallel_size", 4, "4: each worker"),
        ("parallel_config__prefill_context_parallel_size", 2, "2: each worker"),
        ("parallel_config__decode_context_parallel_size", 2, "2: each worker"),
        ("parallel_config__use_ubatching", True, "True: microbatches"),
        ("compilation_config__pass_config__enable_sp", True, "True: sequence parallelism"),
        ("model_config__runner_type", "pooling", "'pooling': the model must generate"),
        ("model_config__is_encoder_decoder", True, "True: encoder-decoder"),
        ("model_config__enable_prompt_embeds", True, "True: prompts must be tokens"),
        ("cache_config__kv_sharing_fast_prefill", True, "True: later layers"),
        ("kv_transfer_config", SimpleNamespace(), "SimpleNamespace: keys and values"),
        ("lora_config", SimpleNamespace(), "SimpleNamespace: adapters"),
        ("diffusion_config", SimpleNamespace(), "SimpleNamespace: diffusion"),
        ("parallel_config__worker_cls", "auto", "'auto': the worker must be"),
    ],
)
def test_unsupported_settings_are_refused_by_name(setting: str, value: Any, named: str) -> None:
    name = setting.replace("__", ".")
    assert name in {path for path, _, _ in CHECKS}
    with pytest.raises(ConfigError, match=rf"^engine\.model: vLLM resolved {name} to {named}"):
        check_supported(resolved(**{setting: value}))
