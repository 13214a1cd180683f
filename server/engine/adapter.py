"""The server process's side of vLLM: the one file outside `engine/worker` that names vLLM.

Another engine generation changes this file and nothing else in the server process.
"""

import dataclasses
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import vllm
from prometheus_client import REGISTRY
from tokenizers.decoders import DecodeStream
from vllm import SamplingParams, envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import enable_envs_cache
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import detokenizer
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.worker.gpu.sample import bad_words, logit_bias

from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.errors import UserError
from rudder.sae_models.precision import fast_precision
from rudder.server.config import Config, ConfigError, Limits, Monitoring
from rudder.server.engine.parent import Target, text_of
from rudder.server.engine.sockets import socket_folder
from rudder.server.engine.supported import check_supported
from rudder.server.engine.traced import code_digest
from rudder.server.monitoring.logs import fields
from rudder.server.monitoring.metrics import LATENCY_BOUNDS, TOKEN_BOUNDS
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
    "StructuredOutputsParams",
    "VLLMClientError",
    "add_request",
    "answer_text",
    "call_workers",
    "check_bad_words",
    "check_limits",
    "enable_envs_cache",
    "engine_args",
    "eos_token_ids",
    "model_facts",
    "numerics",
    "resolve",
    "scheduler_gauges",
    "start_engine_process",
    "start_llm",
]

if hasattr(vllm.exceptions, "VLLMClientError"):
    from vllm.exceptions import VLLMClientError
else:
    # vLLM 0.26 has no base class for the errors of a request.
    from vllm.exceptions import VLLMValidationError as VLLMClientError

VLLM_VERSION: str = vllm.__version__
logger = logging.getLogger(__name__)
WORKER_PACKAGE = "rudder.server.engine.worker"


def bad_words_bound(name: str) -> int:
    """Return a bound on bad words: an environment variable of vLLM, up to 0.26 a constant of its sampler."""
    bound: int = getattr(bad_words, name) if hasattr(bad_words, name) else getattr(envs, f"VLLM_{name}")
    return bound


MAX_BAD_WORDS_TOTAL_TOKENS = bad_words_bound("MAX_BAD_WORDS_TOTAL_TOKENS")
# vLLM's bounds by the field of `limits` that must not exceed it. A worker of the V2 runner dies of more. Each bad word
# is forbidden twice, with and without a space before it.
SAMPLING_BOUNDS = {
    "max_logprobs": AsyncEngineArgs.max_logprobs,
    "max_prompt_logprobs": AsyncEngineArgs.max_logprobs,
    "max_logit_bias": logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS,
    "max_stop_strings": logit_bias.MAX_NUM_STOP_TOKEN_IDS,
    "max_allowed_token_ids": logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS,
    "max_bad_words": bad_words_bound("MAX_NUM_BAD_WORDS") // 2,
}


def check_limits(limits: Limits, eos_tokens: int = 0) -> None:
    """Require that every request within the limits is within vLLM's bounds. Raises ConfigError, which names the limit.

    `eos_tokens`: number of the model's EOS tokens, which vLLM counts among the stop token ids.
    """
    for name, bound in SAMPLING_BOUNDS.items():
        maximum = bound - eos_tokens if name == "max_stop_strings" else bound
        if getattr(limits, name) > maximum:
            raise ConfigError(f"limits.{name}", f"{getattr(limits, name)} is more than the {maximum} that vLLM takes")


def check_bad_words(sampling: SamplingParams, tokenizer: Any) -> None:
    """Require bad words within vLLM's bounds, of which a worker of the V2 runner would die. Raises VLLMClientError."""
    probe = copy(sampling)
    probe.update_from_tokenizer(tokenizer)
    tokens = sum(map(len, probe.bad_words_token_ids or ()))
    if tokens > MAX_BAD_WORDS_TOTAL_TOKENS:
        problem = f"have {tokens} tokens, with and without a space before them, at most {MAX_BAD_WORDS_TOTAL_TOKENS}"
        raise VLLMValidationError(problem, parameter="bad_words")


def eos_token_ids(llm: AsyncLLM) -> set[int]:
    """Return the ids of the tokens that end an output of this model."""
    configured = llm.model_config.try_get_generation_config().get("eos_token_id")
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    return ids | ({llm.get_tokenizer().eos_token_id} - {None})


def engine_args(config: Config, layout: Layout) -> AsyncEngineArgs:
    """Build vLLM's arguments with the steering worker and the bank's layout."""
    engine = config.engine
    on_cpu = runs_on_cpu(engine.device)
    in_engine = on_cpu and engine.tensor_parallel_size == 1
    optional = ("kv_cache_memory_bytes", "gpu_memory_utilization", "quantization", "revision")
    values = {name: getattr(engine, name) for name in optional if getattr(engine, name) is not None}
    return AsyncEngineArgs(
        model=engine.model,
        dtype=resolved_dtype(engine.dtype, on_cpu)[0],
        load_format=engine.load_format,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        enforce_eager=engine.enforce_eager,
        tensor_parallel_size=engine.tensor_parallel_size,
        nnodes=engine.nodes,
        node_rank=engine.node_rank,
        master_addr=engine.leader_address,
        master_port=engine.leader_port,
        distributed_executor_backend=f"{WORKER_PACKAGE}.executor.InEngineProcess" if in_engine else None,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        worker_cls=f"{WORKER_PACKAGE}.{'cpu' if on_cpu else 'gpu'}.Worker",
        additional_config=layout.additional_config(code_digest()),
        disable_log_stats=False,
        tokenizer_revision=engine.revision,
        seed=engine.seed,
        **observability(config.monitoring),
        **values,
    )


def observability(monitoring: Monitoring) -> dict[str, Any]:
    """Return vLLM's arguments for its own histograms and spans, as far as this vLLM has them."""
    latency = list(monitoring.latency_bounds_s or LATENCY_BOUNDS)
    token = list(monitoring.token_bounds_s or TOKEN_BOUNDS)
    buckets = {"request_latency": latency, "time_to_first_token": latency, "inter_token_latency": token}
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    arguments = {"custom_histogram_buckets": buckets, "otlp_traces_endpoint": monitoring.traces_endpoint}
    return {name: value for name, value in arguments.items() if name in known}


# A character has up to four bytes, and a token at least one.
MAX_CHARACTER_TOKENS = 4
# Tokens at the end of a prompt that are decoded again with the output, while its first character is incomplete.
TAIL_TOKENS = 64
REPLACEMENT = "\ufffd"


class FirstCharacterStream:
    """Takes the place of a DecodeStream where the prompt ends inside a character.

    DecodeStream would return the whole prompt with the first character that is complete. This returns what the text
    has beyond the prompt's: the character that the prompt began and the output completed, and what follows.
    """

    def __init__(self, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self.prompt, self.skip_special_tokens = prompt, skip_special_tokens
        self.generated: list[int] = []
        self.tail: tuple[Sequence[int], str] | None = None
        self.stream: DecodeStream | None = None

    def step(self, tokenizer: Any, token: int) -> str | None:
        """Return the text that a token adds; None while a character is incomplete."""
        if self.stream:
            return self.stream.step(tokenizer, token)

        def decode(ids: Sequence[int]) -> str:
            text: str = tokenizer.decode(list(ids), skip_special_tokens=self.skip_special_tokens)
            return text

        self.tail = self.tail or complete_tail(self.prompt, decode)
        self.generated.append(token)
        ids, complete = self.tail
        text = decode([*ids, *self.generated])
        if text.endswith(REPLACEMENT):
            return None
        self.stream = DecodeStream(ids=[*ids, *self.generated], skip_special_tokens=self.skip_special_tokens)
        return text[max(shared_characters(complete, text), shared_characters(decode(ids), text)) :] or None


def complete_tail(prompt: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[Sequence[int], str]:
    """Return the last tokens of a prompt, and their text without an incomplete character at the end.

    They begin between two characters. Where bytes of the prompt are no characters at all, all its tokens are returned.
    """
    first = max(len(prompt) - TAIL_TOKENS, 0)
    for start in range(first, max(first - MAX_CHARACTER_TOKENS, -1), -1):
        for missing in range(MAX_CHARACTER_TOKENS):
            text = decode(prompt[start : len(prompt) - missing])
            if REPLACEMENT not in text:
                return prompt[start:], text
    texts = (decode(prompt[: len(prompt) - missing]) for missing in range(MAX_CHARACTER_TOKENS))
    return prompt, next((text for text in texts if not text.endswith(REPLACEMENT)), "")


def shared_characters(first: str, second: str) -> int:
    """Return the length of the longest prefix that two texts share."""
    differences = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differences, min(len(first), len(second)))


class Detokenizer(detokenizer.FastIncrementalDetokenizer):
    """vLLM's detokenizer, without the prompt in the first text where the prompt ends inside a character."""

    def __init__(self, tokenizer: Any, request: Any) -> None:
        super().__init__(tokenizer, request)
        tail = request.prompt_token_ids[-TAIL_TOKENS:]
        if self.tokenizer.decode(tail, skip_special_tokens=self.skip_special_tokens).endswith(REPLACEMENT):
            self.stream = FirstCharacterStream(request.prompt_token_ids, self.skip_special_tokens)


def answer_text(tokenizer: Any, prompt_ids: Sequence[int], sampling: SamplingParams, ids: Sequence[int]) -> str:
    """Return the text that vLLM streams for an answer of these tokens, if it ends behind them with no stop string."""
    params = copy(sampling)
    params.stop = []
    request: Any = SimpleNamespace(
        request_id="answer", prompt_token_ids=list(prompt_ids), prompt_embeds=None, sampling_params=params
    )
    stream = detokenizer.IncrementalDetokenizer.from_new_request(tokenizer, request)
    stream.update(list(ids), False)
    text: str = stream.get_next_output_text(finished=True, delta=False)
    return text


def resolve(args: AsyncEngineArgs) -> VllmConfig:
    """Resolve vLLM's arguments to the configuration with which the engine starts."""
    return args.create_engine_config(UsageContext.ENGINE_CONTEXT)


def runs_on_cpu(device: str) -> bool:
    """Return whether the model runs on the CPU. Raises ConfigError if the installed vLLM has no such device."""
    has_cpu = bool(current_platform.is_cpu())
    if device != "auto" and has_cpu != (device == "cpu"):
        raise ConfigError("engine.device", f"{device}: the installed vLLM runs on {current_platform.device_type}")
    return has_cpu


def resolved_dtype(dtype: str, on_cpu: bool) -> tuple[str, str]:
    """Return the dtype to give to vLLM, and why. "auto" is the model's own, but on a CPU that is faster in float32."""
    if dtype != "auto":
        return dtype, "as configured"
    if on_cpu and fast_precision("cpu") == "float32":
        return "float32", "this CPU has no matrix unit for bfloat16 (AMX), and is slower in it"
    return "auto", "the model's own"


class EngineStartError(UserError):
    """vLLM refused its configuration, or the engine process could not start with it."""


def start_llm(config: Config, layout: Layout) -> AsyncLLM:
    """Start vLLM with the bank. Blocks until the engine process is up. Raises EngineStartError."""
    # `IncrementalDetokenizer.from_new_request` looks the class up there.
    detokenizer.FastIncrementalDetokenizer = Detokenizer
    dtype, reason = resolved_dtype(config.engine.dtype, runs_on_cpu(config.engine.device))
    logger.info(
        "dtype of the model", extra=fields(dtype=dtype, reason=reason, compiled=not config.engine.enforce_eager)
    )
    return start_engine_process(engine_args(config, layout))


def start_engine_process(args: AsyncEngineArgs, *, plain: bool = False) -> AsyncLLM:
    """Start vLLM; its engine process ends with this one. Raises EngineStartError, with the engine process's own error.

    `plain`: without the steering worker, so that what Rudder does not support is not refused.
    vLLM refuses arguments with a ValueError, and leaves the error of the engine process to its log.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    os.environ.setdefault("VLLM_RPC_BASE_PATH", socket_folder())
    # Fork, vLLM's default on CUDA, takes along the state of OpenMP but not its threads: the first large operation of
    # the engine process then waits for them for ever, if this process has had one.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    try:
        with receiver, sender, target_of_engine_process(Target(EngineCoreProc.run_engine_core, sender)):
            try:
                resolved = resolve(args)
                if not plain:
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


def run_follower(config: Config, layout: Layout) -> None:
    """Run the ranks of this machine, whose steps machine 0 directs. Blocks until one of them ends.

    Raises EngineStartError.
    """
    # It belongs to the engine process, which a server does not import.
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    try:
        resolved = engine_args(config, layout).create_engine_config(UsageContext.ENGINE_CONTEXT, headless=True)
        check_supported(resolved)
        MultiprocExecutor(resolved, monitor_workers=False).start_worker_monitor(inline=True)
    except (RuntimeError, ValueError) as error:
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
    """The served model. `sha256`: of its weights, empty for a hub name or random weights. `vocab_size`: width of the
    logits. `settings`: digest of its other files: configuration, tokenizer, chat template.
    """

    name: str
    sha256: str
    hidden_size: int
    layers: int
    max_model_len: int
    vocab_size: int
    bos_token_id: int | None
    settings: str = ""


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
        settings=bundles.settings_sha256(folder),
    )


def numerics(llm: AsyncLLM) -> dict[str, str]:
    """Return what the numbers of a forward pass depend on besides the model's files."""
    config = llm.vllm_config
    return {
        "vllm": vllm.__version__,
        "torch": str(torch.__version__),
        "rudder": code_digest(),
        "device": str(current_platform.get_device_name()),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "quantization": str(config.model_config.quantization or "none"),
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "compiled": "no" if config.model_config.enforce_eager else "yes",
        "tensor_parallel_size": str(config.parallel_config.tensor_parallel_size),
    }


def model_name(folder: Path) -> str:
    """Return the name of a model's folder; of a snapshot in the Hugging Face cache, the name of its repository."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


# What vLLM's scheduler reports with each step, by the name in the ledger.
GAUGES = {
    "vllm:num_requests_running": "vllm_running",
    "vllm:num_requests_waiting": "vllm_waiting",
    "vllm:kv_cache_usage_perc": "kv_cache_share",
}


def scheduler_gauges() -> dict[str, float]:
    """Return what vLLM's scheduler holds, as it last reported: requests, and the share of KV blocks in use."""
    samples = (sample for family in REGISTRY.collect() for sample in family.samples if sample.name in GAUGES)
    totals = dict.fromkeys(GAUGES.values(), 0.0)
    for sample in samples:
        totals[GAUGES[sample.name]] += sample.value
    return totals


async def add_request(
    llm: AsyncLLM,
    request_id: str,
    prompt_ids: tuple[int, ...],
    cache_salt: str,
    sampling: SamplingParams,
    trace_headers: tuple[tuple[str, str], ...] = (),
) -> RequestOutputCollector:
    """Submit a request and return the queue of its outputs.

    `AsyncLLM.generate` would be one more generator to step through for every token. Raises VLLMClientError if vLLM
    refuses the request, such as a grammar that does not compile.
    """
    prompt = TokensPrompt(prompt_token_ids=list(prompt_ids), cache_salt=cache_salt)
    traced: dict[str, Any] = {"trace_headers": dict(trace_headers)} if trace_headers else {}
    try:
        return await llm.add_request(request_id, prompt, sampling, **traced)
    # The compilers of grammars raise either, and name no parameter.
    except (ValueError, VLLMValidationError) as error:
        if getattr(error, "parameter", None) or not sampling.structured_outputs:
            raise
        raise VLLMValidationError(str(error), parameter="structured_outputs") from error
