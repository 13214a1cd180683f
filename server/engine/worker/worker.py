"""The vLLM worker with a bank in its model. Named to vLLM by `worker_cls`; no file of vLLM is touched."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse.screening import prepare_screening
from rudder.server.engine.telemetry import frame as telemetry
from rudder.server.engine.telemetry.channel import Sender
from rudder.server.engine.worker import runners
from rudder.server.engine.worker.bank import Sequences, SiteBank
from rudder.server.engine.worker.driver import Driver, Step
from rudder.server.engine.worker.hooks import attach, decoder_layers
from rudder.server.engine.worker.reader import Readable, Reader
from rudder.server.program import wire
from rudder.server.program.layout import Layout

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class Channel:
    """Sealed frames to the server process; only rank 0 has one, since all ranks see the same."""

    def __init__(self, address: str, key: bytes) -> None:
        self.key, self.sequence, self.sender = key, 0, Sender(address)

    def send(self, frame: telemetry.Frame) -> None:
        """Send frame number `sequence`."""
        self.sender.send(telemetry.seal(frame, self.key))
        self.sequence += 1


class SteeringWorker:
    """Mixin over the platform's worker class."""

    vllm_config: Any
    model_runner: Any
    rank: int

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then hook the banks before anything is compiled."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        config = self.vllm_config
        layout = Layout.from_additional_config(config.additional_config)
        layers = decoder_layers(self.model_runner.get_model(), config.model_config.hf_text_config.num_hidden_layers)
        device = self.model_runner.device
        dictionaries = {site: whole_dictionary(path, sha256, device) for site, path, sha256 in layout.dictionaries}
        width, tokens = config.model_config.get_hidden_size(), runners.padded_tokens(config)
        banks = build_banks(layout, width, tokens, device, dictionaries)
        for bank in banks:
            attach(bank, layers)
        self.driver, self.reader = Driver(layout, banks), Reader(banks)
        self.channel: Channel | None = None
        self.released: list[int] = []
        runners.install(self.model_runner, self.driver.place)

    def execute_model(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> Any:
        """One step: take in what the scheduler says, run it, report what happened."""
        self.released += self.take_in(scheduler_output)
        output = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        ran = scheduler_output.total_num_scheduled_tokens > 0
        if self.channel and (ran or self.released):
            step = self.driver.step if ran else Step()
            self.channel.send(self.reader.frame(self.channel.sequence, step, self.released))
            self.released = []
        return output

    def take_in(self, scheduler_output: "SchedulerOutput") -> list[int]:
        """Release finished requests, admit new ones; the handles released."""
        for request_id in sorted(scheduler_output.finished_req_ids):
            self.driver.finish(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            payload = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(wire.EXTRA_ARG)
            if payload:
                self.driver.admit(new.req_id, handle_of(new.req_id), wire.decode(payload))
        return [handle_of(request_id) for request_id in scheduler_output.finished_req_ids]

    def rudder_load(self, paths: dict[str, str]) -> dict[str, str]:
        """Load bundles by name from their folders; their hashes, for the server to compare with its own."""
        layout = self.driver.layout
        loaded = {name: bundles.load(Path(path)) for name, path in paths.items()}
        for name, bundle in loaded.items():
            sae = bundle.sae.to(self.model_runner.device)
            self.driver.load_sae(name, sae)
            sites = [layout.sites.index(site) for site in bundle.manifest.sites]
            self.reader.dictionaries[sites[0]] = Readable(prepare_screening(sae), sites)
        return {name: bundle.sha256 for name, bundle in loaded.items()}

    def rudder_pin(self, payload: bytes) -> None:
        """Hold the watched rows of a request for as long as the engine lives, and sum them over all requests."""
        request = wire.decode(payload)
        self.driver.admit("pinned", 0, request)
        live = self.driver.live["pinned"]
        self.reader.pinned = {site.site: [live.places(site)[row] for row in site.watch] for site in request.stages[0]}

    def rudder_connect(self, address: str, key: bytes) -> None:
        """Open the telemetry channel. Frames count from 0."""
        if self.rank == 0:
            self.channel = Channel(address, key)

    def rudder_holds(self, handle: int) -> bool:
        """Whether the worker knows this request."""
        return handle in self.driver.ledger.leases

    def rudder_usage(self) -> dict[str, Any]:
        """Slots and rows held, and requests known: all zero (but for pinned rows) when nothing is in flight."""
        ledger = self.driver.ledger
        rows = [ledger.rows_used(site) for site in range(len(ledger.layout.sites))]
        return {"slots": ledger.slots_used, "rows": rows, "requests": len(self.driver.live)}


def whole_dictionary(path: str, sha256: str, device: torch.device) -> dict[str, SAE]:
    """The SAE of a bundle by its name. BundleError: it is not the one that the server checked."""
    bundle = bundles.mapped(Path(path))
    if bundle.sha256 != sha256:
        raise bundles.BundleError(f"{path}: changed since the server read it")
    return {bundle.manifest.name: bundle.sae.to(device)}


def build_banks(
    layout: Layout,
    width: int,
    max_tokens: int,
    device: torch.device,
    dictionaries: Mapping[str, Mapping[str, SAE]] = MappingProxyType({}),
) -> list[SiteBank]:
    """One bank per site, over shared token columns and sequence state; `dictionaries` to keep whole, by site."""
    token = torch.zeros(5, max_tokens, dtype=torch.int32, device=device)
    sequences = Sequences(layout, max_tokens, device)
    return [
        SiteBank(layout, site, width, max_tokens, token, sequences, dictionaries.get(site, {})) for site in layout.sites
    ]


def handle_of(request_id: str) -> int:
    """The server's number of a request, which it writes in front of the engine's request id."""
    number = request_id.split("-", 1)[0]
    return int(number) if number.isdecimal() else 0
