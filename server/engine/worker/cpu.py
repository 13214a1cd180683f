"""`worker_cls` on a CPU."""

from vllm.v1.worker.cpu_worker import CPUWorker

from rudder.server.engine.worker.worker import SteeringWorker


class Worker(SteeringWorker, CPUWorker):
    """vLLM's CPU worker with banks."""
