"""The server process's side of vLLM: the one file outside `engine/worker` that names vLLM.

Another engine generation changes this file and nothing else in the server process.
"""

from dataclasses import dataclass
from pathlib import Path

import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import enable_envs_cache
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from rudder.sae_models.bundle import bundle as bundles
from rudder.server.config import Config
from rudder.server.engine.traced import code_digest
from rudder.server.program.layout import Layout

__all__ = [
    "VLLM_VERSION",
    "AsyncLLM",
    "EngineDeadError",
    "ModelFacts",
    "RequestOutputCollector",
    "RequestOutputKind",
    "SamplingParams",
    "add_request",
    "enable_envs_cache",
    "engine_args",
    "model_facts",
    "start_llm",
]

VLLM_VERSION: str = vllm.__version__
WORKER_PACKAGE = "rudder.server.engine.worker"


def engine_args(config: Config, layout: Layout) -> AsyncEngineArgs:
    """Build vLLM's arguments with the steering worker and the bank's layout."""
    engine = config.engine
    on_cpu = engine.device == "cpu" or (engine.device == "auto" and current_platform.is_cpu())
    in_engine = on_cpu and engine.tensor_parallel_size == 1
    sizes = {"kv_cache_memory_bytes": engine.kv_cache_memory_bytes} if engine.kv_cache_memory_bytes else {}
    return AsyncEngineArgs(
        model=engine.model,
        dtype=engine.dtype,
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


def start_llm(config: Config, layout: Layout) -> AsyncLLM:
    """Start vLLM. Blocks until the engine process is up."""
    return AsyncLLM.from_engine_args(engine_args(config, layout))


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
        name=folder.name or model.model,
        sha256=bundles.model_sha256(folder) if folder.is_dir() and load_format != "dummy" else "",
        hidden_size=model.get_hidden_size(),
        layers=model.hf_text_config.num_hidden_layers,
        max_model_len=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        bos_token_id=llm.get_tokenizer().bos_token_id,
    )


async def add_request(
    llm: AsyncLLM, request_id: str, prompt_ids: tuple[int, ...], cache_salt: str, sampling: SamplingParams
) -> RequestOutputCollector:
    """Submit a request and return the queue of its outputs.

    `AsyncLLM.generate` would be one more generator to step through for every token.
    """
    prompt = TokensPrompt(prompt_token_ids=list(prompt_ids), cache_salt=cache_salt)
    return await llm.add_request(request_id, prompt, sampling)
