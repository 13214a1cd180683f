"""What Rudder assumes of vLLM's resolved configuration, checked before the engine starts.

vLLM resolves settings that nobody named: from the checkpoint (a speculators checkpoint turns on speculative decoding),
from environment variables and from the platform.
"""

from collections.abc import Callable
from typing import Any

from rudder.server.config import ConfigError

# By setting: whether it is as Rudder needs it, and why. Reads with `attribute`, since versions of vLLM differ.
Check = tuple[str, Callable[[Any], bool], str]
PARALLEL = "each worker must run all layers on all tokens of the batch, once a step"
SIZES_OF_ONE = (
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
)
CHECKS: tuple[Check, ...] = (
    (
        "speculative_config",
        lambda value: value is None,
        "speculative decoding is not supported: a draft model's tokens run outside the bank",
    ),
    *((f"parallel_config.{name}", lambda value: value in (None, 1), PARALLEL) for name in SIZES_OF_ONE),
    ("parallel_config.use_ubatching", lambda value: not value, f"microbatches are not supported: {PARALLEL}"),
    (
        "compilation_config.pass_config.enable_sp",
        lambda value: not value,
        "sequence parallelism is not supported: each rank has only a part of the tokens",
    ),
    ("model_config.runner_type", lambda value: value == "generate", "the model must generate text, not pool or draft"),
    ("model_config.is_encoder_decoder", lambda value: not value, "encoder-decoder models are not supported"),
    ("model_config.enable_prompt_embeds", lambda value: not value, "prompts must be tokens"),
    (
        "cache_config.kv_sharing_fast_prefill",
        lambda value: not value,
        "later layers would not run on the prompt",
    ),
    ("kv_transfer_config", lambda value: value is None, "keys and values of other engines hold other programs' edits"),
    ("ec_transfer_config", lambda value: value is None, "encoder outputs of other engines are not supported"),
    ("lora_config", lambda value: value is None, "adapters are not supported: SAEs are of one checkpoint"),
    ("diffusion_config", lambda value: value is None, "diffusion models are not supported: positions run repeatedly"),
    (
        "parallel_config.worker_cls",
        lambda value: str(value).startswith("rudder.server.engine.worker."),
        "the worker must be Rudder's own",
    ),
)


def check_supported(resolved: Any) -> None:
    """Check vLLM's resolved configuration. Raises ConfigError, which names the setting, its value and the reason."""
    for setting, holds, reason in CHECKS:
        value = attribute(resolved, setting)
        if value is not MISSING and not holds(value):
            raise ConfigError("engine.model", f"vLLM resolved {setting} to {summary(value)}: {reason}")


MISSING = object()


def attribute(resolved: Any, path: str) -> Any:
    """Read a setting by its path; MISSING where this version of vLLM has none."""
    for name in path.split("."):
        resolved = getattr(resolved, name, MISSING)
    return resolved


def summary(value: Any) -> str:
    """Format a value: a nested configuration by its type and method alone."""
    if isinstance(value, bool | int | float | str):
        return repr(value)
    method = getattr(value, "method", None)
    return type(value).__name__ + (f" ({method})" if method else "")
