"""The device that the engine tests run on: the CPU, or a GPU where the installed vLLM is one for CUDA."""

from vllm.platforms import current_platform

ON_GPU = not current_platform.is_cpu()
WORKER = f"rudder.server.engine.worker.{'gpu' if ON_GPU else 'cpu'}.Worker"
# Of a GPU's memory, which tests in other processes use at the same time. All of them name the size of their KV cache.
MEMORY_SHARE = 0.05
