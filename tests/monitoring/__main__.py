"""`make monitoring`: a server under mixed traffic and a Prometheus with Rudder's rules, until Ctrl-C."""

import sys
import tempfile
import time
from pathlib import Path

from tests.monitoring import rig
from tests.monitoring.files import DASHBOARDS, ROOT
from tests.monitoring.prometheus import binary

INTERVAL = "5s"


def main() -> int:
    """Run until Ctrl-C; return the exit status."""
    if binary("prometheus") is None:
        print("no prometheus: `make prometheus` installs one", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="rudder-monitoring-") as folder:
        print("starting a server, traffic and Prometheus", flush=True)
        try:
            with rig.running(Path(folder), interval=INTERVAL) as running:
                say(running)
                while running.server.process.poll() is None:
                    time.sleep(1)
                print(running.server.log.read_text()[-2000:], file=sys.stderr)
                return 1
        except KeyboardInterrupt:
            print("\nstopped")
    return 0


def say(running: rig.Rig) -> None:
    """Print where to look."""
    prometheus = f"http://{running.prometheus.address}"
    dashboards = ", ".join(str(path.relative_to(ROOT)) for path in DASHBOARDS)
    print(
        f"""
Prometheus   {prometheus}/graph?g0.expr=rudder_saturation&g0.tab=0
alerts       {prometheus}/alerts
rules        {prometheus}/rules
metrics      http://127.0.0.1:{running.server.metrics_port}/metrics
gRPC         {running.server.address}
log          {running.server.log}
dashboards   import these into a Grafana whose data source is {prometheus}:
             {dashboards}
Ctrl-C ends all of it.""",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
