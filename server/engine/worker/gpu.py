"""`worker_cls` on CUDA."""

from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from rudder.server.engine.worker.worker import SteeringWorker


class Worker(SteeringWorker, GPUWorker):
    """vLLM's GPU worker with banks."""
