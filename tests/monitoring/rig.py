"""A server with policies, tokens, an audit log and watched features, its traffic, and a Prometheus that scrapes it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import bundle
from rudder.server.safety.audit import chain
from tests.e2e import conftest as servers
from tests.e2e.conftest import Running
from tests.monitoring import collector as collecting
from tests.monitoring import prometheus, traffic
from tests.monitoring.collector import Collector
from tests.monitoring.prometheus import Prometheus, Target
from tests.monitoring.traffic import BUNDLE, WATCHED, Traffic

JOB = "rudder"


@dataclass(frozen=True)
class Rig:
    """What runs. `policies`: the folder of the server's policies."""

    server: Running
    prometheus: Prometheus
    traffic: Traffic
    policies: Path
    collector: Collector


def flags(folder: Path, collector: Collector) -> dict[str, str]:
    """Write what the server reads into `folder`; return the flags that name it."""
    chain.create_key(folder / "audit.key")
    traffic.write_policies(folder / "policies", bundle.load(PRETRAINED / BUNDLE).sha256)
    return {
        "policies.folder": str(folder / "policies"),
        "policies.reload_s": "1",
        "audit.folder": str(folder / "audit"),
        "audit.key_file": str(folder / "audit.key"),
        "identity.tokens": str(folder / "tokens.yaml"),
        "engine.max_num_seqs": "8",
        "logs.format": "json",
        "monitoring.traces_endpoint": collector.endpoint,
        "watch": f"[{', '.join(f'{{index: {index}}}' for index in WATCHED)}]",
    }


@contextmanager
def running(folder: Path, without: Mapping[str, tuple[str, ...]] | None = None, interval: str = "1s") -> Iterator[Rig]:
    """Run all of them, a collector of traces first.

    `without`: further jobs that scrape the same server and drop these metrics.
    """
    made = traffic.write_tokens(folder / "tokens.yaml")
    with collecting.running() as collector, servers.running(folder, **flags(folder, collector)) as server:
        address = f"127.0.0.1:{server.metrics_port}"
        targets = {JOB: Target(address), **{job: Target(address, names) for job, names in (without or {}).items()}}
        with prometheus.running(folder, targets, interval) as scraping, traffic.running(server.address, made) as calls:
            scraping.wait_scraped(JOB)
            yield Rig(server, scraping, calls, folder / "policies", collector)
