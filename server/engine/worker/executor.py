"""The executor for one rank on a CPU: the worker runs in the engine process.

vLLM's default there is a separate worker process, for which the engine process busy-waits on a core that the model
needs.
"""

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class InEngineProcess(UniProcExecutor):
    """vLLM's single-process executor, under a name that its CPU platform does not replace."""
