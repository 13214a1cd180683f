"""`worker_cls` on CUDA that can note at which places its steps let the host wait for the device."""

from typing import Any

from rudder.server.engine.worker.gpu import Worker as GpuWorker
from tests.gpu.waits import REGIONS, Watch


class Worker(GpuWorker):
    """Rudder's worker on CUDA, watched."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Let the worker's part of each step be watched."""
        self.watch = Watch()
        for owner, name in REGIONS:
            setattr(owner, name, self.watch.over(getattr(owner, name)))
        super().load_model(*args, **kwargs)

    def rudder_watch(self) -> None:
        """Watch all steps from now on."""
        self.watch.on = True

    def rudder_waits(self) -> list[str]:
        """Watch no more steps; return the places at which one waited."""
        self.watch.on = False
        return sorted(self.watch.places)
