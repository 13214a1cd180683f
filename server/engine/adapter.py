"""The server process's side of vLLM: the one file outside `engine/worker` that names vLLM.

Another engine generation changes this file and nothing else in the server process.
"""

import logging
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import enable_envs_cache
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.errors import UserError
from rudder.server.config import Config, ConfigError
from rudder.server.engine.parent import Target, text_of
from rudder.server.engine.sockets import socket_folder
from rudder.server.engine.supported import check_supported
from rudder.server.engine.traced import code_digest
from rudder.server.monitoring.logs import fields
from rudder.server.program.layout import Layout

__all__ = [
    "VLLM_VERSION",
    "AsyncLLM",
    "EngineDeadError",
    "EngineStartError",
    "ModelFacts",
    "RequestOutputCollector",
    "RequestOutputKind",
    "SamplingParams",
    "add_request",
    "call_workers",
    "enable_envs_cache",
    "engine_args",
    "model_facts",
    "resolve",
    "start_engine_process",
    "start_llm",
]

VLLM_VERSION: str = vllm.__version__
# Of /proc/cpuinfo: x86-64, and Arm.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
logger = logging.getLogger(__name__)
WORKER_PACKAGE = "rudder.server.engine.worker"


def engine_args(config: Config, layout: Layout) -> AsyncEngineArgs:
    """Build vLLM's arguments with the steering worker and the bank's layout."""
    engine = config.engine
    on_cpu = runs_on_cpu(engine.device)
    in_engine = on_cpu and engine.tensor_parallel_size == 1
    sizes = {"kv_cache_memory_bytes": engine.kv_cache_memory_bytes} if engine.kv_cache_memory_bytes else {}
    return AsyncEngineArgs(
        model=engine.model,
        dtype=resolved_dtype(engine.dtype, on_cpu)[0],
        load_format=engine.load_format,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        enforce_eager=engine.enforce_eager,
        tensor_parallel_size=engine.tensor_parallel_size,
        distributed_executor_backend=f"{WORKER_PACKAGE}.executor.InEngineProcess" if in_engine else None,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        worker_cls=f"{WORKER_PACKAGE}.{'cpu' if on_cpu else 'gpu'}.Worker",
        additional_config=layout.additional_config(code_digest()),
        disable_log_stats=False,
        **sizes,
    )


def resolve(args: AsyncEngineArgs) -> VllmConfig:
    """Resolve vLLM's arguments to the configuration with which the engine starts."""
    return args.create_engine_config(UsageContext.ENGINE_CONTEXT)


def runs_on_cpu(device: str) -> bool:
    """Return whether the model runs on the CPU. Raises ConfigError if the installed vLLM has no such device."""
    has_cpu = bool(current_platform.is_cpu())
    if device != "auto" and has_cpu != (device == "cpu"):
        raise ConfigError("engine.device", f"{device}: the installed vLLM runs on {current_platform.device_type}")
    return has_cpu


def resolved_dtype(dtype: str, on_cpu: bool, cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, str]:
    """Return the dtype to give to vLLM, and why. "auto" is the model's own, but where the CPU would emulate it."""
    if dtype != "auto":
        return dtype, "as configured"
    words = set(cpuinfo.read_text().split()) if on_cpu and cpuinfo.is_file() else set()
    if on_cpu and words and not BFLOAT16_FLAGS & words:
        return "float32", "this CPU has no instructions for bfloat16 (AVX-512 BF16, AMX), which it would emulate"
    return "auto", "the model's own"


class EngineStartError(UserError):
    """vLLM refused its configuration, or the engine process could not start with it."""


def start_llm(config: Config, layout: Layout) -> AsyncLLM:
    """Start vLLM with the bank. Blocks until the engine process is up. Raises EngineStartError."""
    dtype, reason = resolved_dtype(config.engine.dtype, runs_on_cpu(config.engine.device))
    logger.info("dtype of the model", extra=fields(dtype=dtype, reason=reason))
    return start_engine_process(engine_args(config, layout))


def start_engine_process(args: AsyncEngineArgs) -> AsyncLLM:
    """Start vLLM; its engine process ends with this one. Raises EngineStartError, with the engine process's own error.

    vLLM refuses arguments with a ValueError, and leaves the error of the engine process to its log.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    os.environ.setdefault("VLLM_RPC_BASE_PATH", socket_folder())
    try:
        with receiver, sender, target_of_engine_process(Target(EngineCoreProc.run_engine_core, sender)):
            try:
                resolved = resolve(args)
                check_supported(resolved)
                return AsyncLLM.from_vllm_config(
                    resolved,
                    enable_log_requests=args.enable_log_requests,
                    disable_log_stats=args.disable_log_stats,
                )
            except RuntimeError as error:
                if receiver.poll():
                    raise EngineStartError(f"the engine did not start: {receiver.recv()}") from error
                if "Engine core initialization failed" in str(error):
                    raise EngineStartError(f"the engine did not start: {error}") from error
                raise
    except UserError:
        raise
    except ValueError as error:
        raise EngineStartError(f"vLLM: {error}") from error


@contextmanager
def target_of_engine_process(target: Target) -> Iterator[None]:
    """Let vLLM run `target` in the engine processes that it starts within the context."""
    function = EngineCoreProc.__dict__["run_engine_core"]
    EngineCoreProc.run_engine_core = target
    try:
        yield
    finally:
        EngineCoreProc.run_engine_core = function


async def call_workers(llm: AsyncLLM, method: str, *args: Any) -> list[Any]:
    """Call a method of every worker, as part of the start; return the results by rank. Raises EngineStartError.

    vLLM reports a worker's error as a bare Exception with its text.
    """
    try:
        results: list[Any] = await llm.collective_rpc(method, args=args)
    except Exception as error:
        raise EngineStartError(f"the engine did not start: {text_of(error)}") from error
    return results


@dataclass(frozen=True)
class ModelFacts:
    """The served model. `sha256`: of its files, empty for a hub name or random weights. `vocab_size`: width of the
    logits.
    """

    name: str
    sha256: str
    hidden_size: int
    layers: int
    max_model_len: int
    vocab_size: int
    bos_token_id: int | None


def model_facts(llm: AsyncLLM, load_format: str) -> ModelFacts:
    """Read the facts of the loaded model from vLLM, and hash its files."""
    model = llm.model_config
    folder = Path(model.model)
    return ModelFacts(
        name=model_name(folder) or model.model,
        sha256=bundles.model_sha256(folder) if folder.is_dir() and load_format != "dummy" else "",
        hidden_size=model.get_hidden_size(),
        layers=model.hf_text_config.num_hidden_layers,
        max_model_len=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        bos_token_id=llm.get_tokenizer().bos_token_id,
    )


def model_name(folder: Path) -> str:
    """Return the name of a model's folder; of a snapshot in the Hugging Face cache, the name of its repository."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


async def add_request(
    llm: AsyncLLM, request_id: str, prompt_ids: tuple[int, ...], cache_salt: str, sampling: SamplingParams
) -> RequestOutputCollector:
    """Submit a request and return the queue of its outputs.

    `AsyncLLM.generate` would be one more generator to step through for every token.
    """
    prompt = TokensPrompt(prompt_token_ids=list(prompt_ids), cache_salt=cache_salt)
    return await llm.add_request(request_id, prompt, sampling)
