"""The executor for one rank on a CPU: the worker lives in the engine process.

vLLM's own choice there is a worker process of its own, for which the engine process spins on a core that the model
needs.
"""

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class InEngineProcess(UniProcExecutor):
    """vLLM's single-process executor, under a name that its CPU platform does not replace."""
