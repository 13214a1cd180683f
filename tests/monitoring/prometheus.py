"""A real Prometheus beside a server: what `make prometheus` installs, or what is on PATH."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from rudder.server.process import free_port, stop
from tests.monitoring.files import ROOT, rules

INSTALLED = ROOT / "build" / "prometheus"


def binary(name: str) -> str | None:
    """Return the path of `prometheus` or `promtool`; None where there is none."""
    path = INSTALLED / name
    return str(path) if path.exists() else shutil.which(name)


@dataclass(frozen=True)
class Target:
    """A server's metrics endpoint, `host:port`. `without`: metrics that are dropped on their way."""

    address: str
    without: Sequence[str] = ()


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus at `http://address`."""

    address: str

    def get(self, path: str, **parameters: str | float) -> Any:
        """Return the data of an answer of the HTTP API."""
        with urlopen(f"http://{self.address}/api/v1/{path}?{urlencode(parameters)}") as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and present value of each series of an expression."""
        result = self.get("query", query=expression)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[tuple[dict[str, str], Any]]:
        """Return labels and samples [(time, value as text)] of each series of an expression."""
        result = self.get("query_range", query=expression, start=start, end=end, step=step)["result"]
        return [(series["metric"], series["values"]) for series in result]

    def wait_scraped(self, job: str, seconds: float = 60) -> None:
        """Wait until a job's target is up."""
        deadline = time.monotonic() + seconds
        while not any(value for _, value in self.query(f'up{{job="{job}"}}')):
            assert time.monotonic() < deadline, self.get("targets")
            time.sleep(0.2)


def configuration(targets: Mapping[str, Target], interval: str) -> dict[str, Any]:
    """Return prometheus.yml for these jobs."""
    return {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {
                "job_name": job,
                "static_configs": [{"targets": [target.address]}],
                "metric_relabel_configs": [
                    {"source_labels": ["__name__"], "regex": f"{name}.*", "action": "drop"} for name in target.without
                ],
            }
            for job, target in targets.items()
        ],
    }


def hurried(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return rules of which all groups are evaluated at the global interval."""
    return {"groups": [{k: v for k, v in group.items() if k != "interval"} for group in document["groups"]]}


@contextmanager
def running(folder: Path, targets: Mapping[str, Target], interval: str = "1s") -> Iterator[Prometheus]:
    """Run a Prometheus with the rules; its data is in `folder`. Rules run at the interval of the scrapes, too."""
    command = binary("prometheus")
    assert command, "make prometheus installs one"
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration(targets, interval)))
    (folder / "rules.yaml").write_text(yaml.safe_dump(hurried(rules())))
    address = f"127.0.0.1:{free_port()}"
    arguments = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": address,
        "enable-feature": "exemplar-storage",
        "log.level": "warn",
    }
    with (folder / "prometheus.log").open("wb") as log:
        flags = [f"--{name}={value}" for name, value in arguments.items()]
        process = subprocess.Popen([command, *flags], stdout=log, stderr=log, start_new_session=True)
    try:
        wait_ready(process, address, folder / "prometheus.log")
        yield Prometheus(address)
    finally:
        stop(process)


def wait_ready(process: "subprocess.Popen[bytes]", address: str, log: Path, seconds: float = 60) -> None:
    """Wait until Prometheus answers; fail with its log."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urlopen(f"http://{address}/-/ready").close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
