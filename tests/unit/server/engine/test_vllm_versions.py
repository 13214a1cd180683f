"""The engine code runs on vLLM 0.26 and 0.32: what it takes from vLLM is there in both, under either model runner.

The facts of 0.26 were read from its wheel; those of 0.32 are compared with the installed vLLM, without importing the
parts that need a GPU.
"""

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import vllm.exceptions
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.worker.gpu.sample import bad_words

from rudder.server.engine import adapter
from rudder.server.engine.worker import runners

SERVER = Path(__file__).parents[4] / "server"
# Names that vLLM 0.26 has, of those that the server imports.
NAMES_OF_0_26 = {
    "vllm": {"SamplingParams", "envs"},
    "vllm.config": {"VllmConfig"},
    "vllm.engine.arg_utils": {"AsyncEngineArgs"},
    "vllm.envs": {"enable_envs_cache"},
    "vllm.exceptions": {"VLLMValidationError"},
    "vllm.forward_context": {"set_forward_context"},
    "vllm.inputs": {"TokensPrompt"},
    "vllm.model_executor.layers.attention": {"Attention", "MLAAttention"},
    "vllm.model_executor.model_loader": {"register_model_loader"},
    "vllm.model_executor.model_loader.dummy_loader": {"DummyModelLoader"},
    "vllm.platforms": {"current_platform"},
    "vllm.sampling_params": {"RequestOutputKind", "StructuredOutputsParams"},
    "vllm.usage.usage_lib": {"UsageContext"},
    "vllm.v1.core.sched.output": {"SchedulerOutput"},
    "vllm.v1.engine": {"detokenizer"},
    "vllm.v1.engine.async_llm": {"AsyncLLM"},
    "vllm.v1.engine.core": {"EngineCoreProc"},
    "vllm.v1.engine.exceptions": {"EngineDeadError"},
    "vllm.v1.engine.output_processor": {"RequestOutputCollector"},
    "vllm.v1.executor.multiproc_executor": {"MultiprocExecutor"},
    "vllm.v1.executor.uniproc_executor": {"UniProcExecutor"},
    "vllm.v1.worker.cpu_worker": {"CPUWorker"},
    "vllm.v1.worker.gpu.sample": {"bad_words", "logit_bias"},
    "vllm.v1.worker.gpu_worker": {"Worker"},
}
# Where 0.26 lacks a name, the adapter has another for it.
REPLACED_IN_0_26 = {"vllm.exceptions": {"VLLMClientError"}}
ENGINE_ARGS_OF_0_26 = {
    "additional_config", "disable_log_stats", "distributed_executor_backend", "dtype", "enable_chunked_prefill",
    "enable_log_requests", "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization",
    "kv_cache_memory_bytes", "load_format", "master_addr", "master_port", "max_logprobs", "max_model_len",
    "max_num_batched_tokens", "max_num_seqs", "model", "nnodes", "node_rank", "profiler_config", "quantization",
    "revision", "seed", "tensor_parallel_size", "tokenizer_revision", "worker_cls",
}  # fmt: skip
# By version and runner: parameters of the method that `runners.install` wraps.
V1, V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"
METHODS = {V1: "_prepare_inputs", V2: "prepare_inputs"}
PARAMETERS: dict[str, dict[str, tuple[str, ...]]] = {
    "0.26": {
        V1: ("scheduler_output", "num_scheduled_tokens"),
        V2: ("scheduler_output", "batch_desc"),
    },
    "0.32": {
        V1: ("scheduler_output", "num_scheduled_tokens"),
        V2: ("scheduler_output", "batch_req_state", "batch_desc", "num_active_loras"),
    },
}
# Fields that are read of the batch, and flags by which a runner finds its CUDA graphs: the same in both versions.
BATCH_FIELDS = {
    "vllm.v1.worker.gpu_input_batch": {"req_ids", "num_reqs", "num_computed_tokens_cpu"},
    "vllm.v1.worker.gpu.input_batch": {"req_ids", "num_scheduled_tokens", "num_computed_tokens_np"},
}
# What the worker overrides, and the method by which vLLM collects an output that is still computed: in both versions.
OVERRIDDEN = {
    "vllm.v1.worker.gpu_worker": {"load_model", "execute_model", "sample_tokens"},
    "vllm.v1.outputs": {"AsyncModelRunnerOutput", "get_output"},
}
GRAPH_FLAGS = {
    "vllm.v1.cudagraph_dispatcher": {"keys_initialized"},
    "vllm.v1.worker.gpu.cudagraph_utils": {"_graphs_captured"},
    V1: {"cudagraph_dispatcher", "input_batch"},
    V2: {"cudagraph_manager"},
}


def source_of(module: str) -> str:
    """Return the source of a module of the installed vLLM without importing it."""
    path = Path(vllm.__file__).parent.joinpath(*module.split(".")[1:])
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def names_in(module: str) -> set[str]:
    """Return every name that a module of the installed vLLM defines, imports or assigns, also of attributes."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source_of(module))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
                names.add(name)
            case ast.alias():
                names.add(node.asname or node.name)
    folder = Path(vllm.__file__).parent.joinpath(*module.split(".")[1:])
    return names | {path.stem for path in folder.glob("*.py")} if folder.is_dir() else names


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of everything that a file imports from vLLM."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "vllm":
            yield from ((node.module, alias.name) for alias in node.names)


# Of the stock servers that it measures, no other version is asked for.
FILES = [path for path in SERVER.rglob("*.py") if path != SERVER / "bench/http.py"]
USED = {pair for path in FILES for pair in imports(ast.parse(path.read_text(encoding="utf-8")))}


def test_server_imports_only_what_both_versions_have() -> None:
    known = {(m, name) for facts in (NAMES_OF_0_26, REPLACED_IN_0_26) for m, names in facts.items() for name in names}
    assert known >= USED, "look for the name in the wheel of vLLM 0.26, then add it to the facts"


@pytest.mark.parametrize(("module", "name"), sorted(USED))
def test_installed_vllm_has_each_imported_name(module: str, name: str) -> None:
    assert name in names_in(module)


@pytest.mark.parametrize(("module", "names"), [*BATCH_FIELDS.items(), *OVERRIDDEN.items(), *GRAPH_FLAGS.items()])
def test_installed_vllm_has_the_fields_that_the_worker_reads(module: str, names: set[str]) -> None:
    assert names <= names_in(module)


def test_engine_arguments_are_those_of_both_versions() -> None:
    tree = ast.parse(inspect.getsource(adapter.engine_args))
    keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg} - {"code"}
    assert len(keywords) > 10
    assert keywords <= ENGINE_ARGS_OF_0_26
    assert AsyncEngineArgs.__dataclass_fields__.keys() >= ENGINE_ARGS_OF_0_26


@pytest.mark.parametrize("module", METHODS)
def test_installed_runner_has_the_signature_that_is_wrapped(module: str) -> None:
    (method,) = (
        node
        for node in ast.walk(ast.parse(source_of(module)))
        if isinstance(node, ast.FunctionDef) and node.name == METHODS[module]
    )
    parameters = tuple(argument.arg for argument in method.args.args if argument.arg != "self")
    assert parameters == PARAMETERS["0.32"][module]


@pytest.mark.parametrize("version", PARAMETERS)
@pytest.mark.parametrize("module", METHODS)
def test_batch_order_is_read_from_either_runner_of_both_versions(version: str, module: str) -> None:
    parameters, lengths = PARAMETERS[version][module], np.array([2, 1], np.int32)
    persistent = SimpleNamespace(
        num_reqs=2, req_ids=["a", "b", "old"], num_computed_tokens_cpu=np.array([4, 0, 9], np.int32)
    )
    batch = SimpleNamespace(
        req_ids=["a", "b"], num_scheduled_tokens=lengths, num_computed_tokens_np=np.array([4, 0], np.int32)
    )
    runner = SimpleNamespace(input_batch=persistent)

    def prepare(*arguments: Any) -> Any:
        assert len(arguments) == len(parameters)
        return batch

    setattr(runner, METHODS[module], prepare)
    orders: list[Any] = []
    runners.install(runner, lambda *order: orders.append(order))
    arguments = [lengths if name == "num_scheduled_tokens" else object() for name in parameters]
    assert getattr(runner, METHODS[module])(*arguments) is batch
    ((ids, starts, tokens),) = orders
    assert (list(ids), starts.tolist(), tokens.tolist()) == (["a", "b"], [4, 0], [2, 1])


@pytest.mark.parametrize(
    ("runner", "flag"),
    [
        (SimpleNamespace(cudagraph_dispatcher=SimpleNamespace(keys_initialized=True)), "keys_initialized"),
        (SimpleNamespace(cudagraph_manager=SimpleNamespace(_graphs_captured=True)), "_graphs_captured"),
        (SimpleNamespace(cudagraph_manager=SimpleNamespace(_graphs_captured=False)), "_graphs_captured"),
    ],
)
def test_cuda_graphs_of_either_runner_are_left_out_for_a_while(runner: Any, flag: str) -> None:
    (owner,) = vars(runner).values()
    before = getattr(owner, flag)
    resume = runners.without_cuda_graphs(runner)
    assert not getattr(owner, flag)
    resume()
    assert getattr(owner, flag) is before


def test_bounds_on_bad_words_come_from_where_each_version_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapter.bad_words_bound("MAX_NUM_BAD_WORDS") == 128
    monkeypatch.setattr(bad_words, "MAX_NUM_BAD_WORDS", 64, raising=False)
    assert adapter.bad_words_bound("MAX_NUM_BAD_WORDS") == 64


def test_adapter_has_a_client_error_where_vllm_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(vllm.exceptions, "VLLMClientError")
    spec = importlib.util.spec_from_file_location("adapter_of_0_26", adapter.__file__)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.VLLMClientError is vllm.exceptions.VLLMValidationError
