"""vLLM's worker with banks in its model. vLLM loads it by `worker_cls`; none of vLLM's files is changed."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.hookpoints import parse
from rudder.sae_models.operations import TOKEN
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse.screening import prepare_screening
from rudder.server import failpoints
from rudder.server.engine.ledger import PINNED_HANDLE
from rudder.server.engine.parent import end_with_parent
from rudder.server.engine.telemetry.channel import Sender
from rudder.server.engine.worker import runners
from rudder.server.engine.worker.bank import Sequences, SiteBank
from rudder.server.engine.worker.driver import Driver, Step
from rudder.server.engine.worker.dummy import measure_layers
from rudder.server.engine.worker.hooks import attach, decoder_layers, layer_numbers
from rudder.server.engine.worker.outbox import Outbox
from rudder.server.engine.worker.reader import Readable, Reader
from rudder.server.engine.worker.witness import Witness
from rudder.server.program import wire
from rudder.server.program.layout import Layout

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

logger = logging.getLogger(__name__)


class SteeringWorker:
    """Mixin over the platform's worker class. The methods rudder_* are called by `collective_rpc`."""

    vllm_config: Any
    model_runner: Any
    rank: int
    resume_cuda_graphs: Callable[[], None]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then hook the banks, before anything is compiled."""
        if (parent := parent_process()) and parent.pid:
            end_with_parent(parent.pid)
        config = self.vllm_config
        if config.load_config.load_format == "dummy":
            # Not imported for other models: its parent class brings all of vLLM's loaders.
            from rudder.server.engine.worker import dummy_weights

            dummy_weights.register()
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        log_like_vllm()
        layout = Layout.from_additional_config(config.additional_config)
        layers = decoder_layers(self.model_runner.get_model(), config.model_config.hf_text_config.num_hidden_layers)
        device = self.model_runner.device
        self.bundles = {name: load_bundle(name, path, device) for name, path, _ in layout.bundles}
        whole = {path: site for site, path, _ in layout.dictionaries}
        dictionaries: dict[str, dict[str, SAE]] = {}
        for name, path, _ in layout.bundles:
            if path in whole:
                dictionaries.setdefault(whole[path], {})[name] = self.bundles[name].sae
        width, tokens = config.model_config.get_hidden_size(), runners.padded_tokens(config)
        banks = build_banks(layout, width, tokens, device, dictionaries, config.model_config.dtype)
        numbers = layer_numbers(layout.sites, layers)
        self.readings = measure_layers(self.model_runner, config, layers, numbers)
        for bank in banks:
            attach(bank, layers, self.readings[parse(bank.site)[0]])
        self.driver, self.reader = Driver(layout, banks), Reader(banks)
        for name, bundle in self.bundles.items():
            self.serve_bundle(name, bundle)
        self.outbox: Outbox | None = None
        self.released: list[int] = []
        runners.install(self.model_runner, self.driver.write_token_metadata)
        logger.info(
            "bank attached at %s: %d row places per site, %d slots, %d bytes on %s",
            ", ".join(layout.sites), layout.rows, layout.slots, bytes_of(banks), device,
        )  # fmt: skip

    def serve_bundle(self, name: str, bundle: bundles.Bundle) -> None:
        """Make a bundle's latents available as rows; if it is the first of its site, its dictionary as a whole, too."""
        self.driver.load_sae(name, bundle.sae)
        sites = [self.driver.layout.sites.index(site) for site in bundle.manifest.sites]
        if sites[0] in self.reader.dictionaries:
            return
        screen = prepare_screening(bundle.sae)
        self.reader.dictionaries[sites[0]] = Readable(screen, sites)
        copies = 0 if isinstance(screen, SAE) else tensor_bytes(screen)
        logger.info(
            "bundle %s: %d bytes, and %d bytes for screening, on %s",
            name, tensor_bytes(bundle.sae), copies, bundle.sae.encoder.device,
        )  # fmt: skip

    def execute_model(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> Any:
        """Run one step: release and admit requests, run the model, begin to read the step's frame."""
        self.released += self.update_requests(scheduler_output)
        output = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        ran = scheduler_output.total_num_scheduled_tokens > 0
        if self.outbox and (ran or self.released):
            self.outbox.put(self.reader.read(self.driver.step if ran else Step(), self.released))
            self.released = []
        return self.behind_frames(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the tokens of the step that ran last."""
        return self.behind_frames(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]

    def behind_frames(self, output: Any) -> Any:
        """Let vLLM have a step's output behind the frames of this step and of those before it."""
        return runners.announced(output, partial(self.outbox.send, self.outbox.frames)) if self.outbox else output

    def update_requests(self, scheduler_output: "SchedulerOutput") -> list[int]:
        """Release finished requests and admit new ones; return the handles released."""
        failpoints.hit("engine.step")
        # Sorted: all ranks must give the same row places to the same requests, and this is a set.
        for request_id in sorted(scheduler_output.finished_req_ids):
            self.driver.finish(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            payload = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(wire.EXTRA_ARG)
            if payload:
                handle = handle_of(new.req_id)
                if handle is None:
                    raise RuntimeError(f"request {new.req_id!r} has a program, but not the server's handle")
                self.driver.admit(new.req_id, handle, wire.decode(payload))
        handles = map(handle_of, scheduler_output.finished_req_ids)
        return [handle for handle in handles if handle is not None]

    def rudder_layout(self) -> str:
        """Return the layout of the banks, and the digest of the code, as JSON."""
        return json.dumps(self.vllm_config.additional_config, sort_keys=True)

    def rudder_bundles(self) -> dict[str, str]:
        """The SHA-256 of each bundle that was loaded with the model, which the server compares with its own."""
        return {name: bundle.sha256 for name, bundle in self.bundles.items()}

    def rudder_pin(self, payload: bytes) -> None:
        """Hold a request's watched rows in place of those pinned before; total their activations over all requests."""
        self.rudder_drop(PINNED_HANDLE)
        self.rudder_hold(PINNED_HANDLE, payload)
        state = self.driver.requests[held_request(PINNED_HANDLE)]
        sites = state.request.stages[0]
        self.reader.pin({site.site: [state.places(site)[row] for row in site.watch] for site in sites})

    def rudder_hold(self, handle: int, payload: bytes) -> None:
        """Hold the rows of a request that never runs, under a handle that is no request's, until `rudder_drop`."""
        self.driver.admit(held_request(handle), handle, wire.decode(payload))

    def rudder_drop(self, handle: int) -> None:
        """Hold these rows no longer. Those that a running request uses stay until it ends."""
        self.driver.finish(held_request(handle))

    def rudder_connect(self, address: str, key: bytes) -> None:
        """Open the telemetry channel, from rank 0 only, since all ranks see the same. Frames count from 0."""
        if self.rank == 0:
            self.outbox = Outbox(Sender(address, key))
            logger.info("telemetry connected")

    def rudder_holds(self, handle: int) -> bool:
        """Whether the worker knows this request. If not, all frames that name it are sent."""
        if self.outbox:
            self.outbox.send(self.outbox.frames)
        return handle in self.driver.ledger.leases

    def rudder_leases(self) -> int:
        """Return the number of requests that hold something, without what is held for pinned features and policies."""
        return sum(handle > PINNED_HANDLE for handle in self.driver.ledger.leases)

    def rudder_witness(self, boundaries: tuple[int, ...]) -> dict[tuple[int, int], bytes]:
        """Record the residual stream in front of these layers from now on, the model running eagerly; with none, stop.

        Returns what was recorded before, by (request handle, layer).
        """
        witness, self.witness = getattr(self, "witness", None), None
        recorded = witness.detach() if witness else {}
        if witness:
            self.resume_cuda_graphs()
        if boundaries:
            model, text = self.model_runner.get_model(), self.vllm_config.model_config.hf_text_config
            layers = decoder_layers(model, text.num_hidden_layers)
            self.witness = Witness(layers, self.driver.banks[0].width, self.batch_spans)
            self.witness.attach(model, boundaries)
            self.resume_cuda_graphs = runners.without_cuda_graphs(self.model_runner)
        return recorded

    def batch_spans(self) -> list[tuple[int, int, int]]:
        """(handle, batch index of the first token, tokens) of each request in this step."""
        step = self.driver.step
        columns = (step.batch.handles, step.offsets, step.lengths)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def rudder_refusals(self) -> dict[int, dict[str, str]]:
        """Return, by hooked layer, the hook points that are not served, and why."""
        return {number: dict(reading.refusals) for number, reading in self.readings.items()}

    def rudder_usage(self) -> dict[str, Any]:
        """Count slots and row places held and requests known: all 0, but for pinned rows, when none is in flight."""
        ledger = self.driver.ledger
        rows = [ledger.rows_used(site) for site in range(len(ledger.layout.sites))]
        return {"slots": ledger.slots_used, "rows": rows, "requests": len(self.driver.requests)}


def load_bundle(name: str, path: str, device: torch.device) -> bundles.Bundle:
    """Load a bundle that the server has checked, its SAE on the device. Raises BundleError if it has changed since."""
    bundle = bundles.load(Path(path))
    if bundle.manifest.name != name:
        raise bundles.BundleError(f"{path}: changed since the server read it")
    return replace(bundle, sae=bundle.sae.to(device))


def tensor_bytes(holder: Any) -> int:
    """Bytes of a dataclass's own tensors."""
    values = (getattr(holder, field.name) for field in fields(holder))
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def build_banks(
    layout: Layout,
    width: int,
    max_tokens: int,
    device: torch.device,
    dictionaries: Mapping[str, Mapping[str, SAE]] = MappingProxyType({}),
    dtype: torch.dtype = torch.float32,
) -> list[SiteBank]:
    """Build the banks of all sites over shared token metadata and state.

    `dictionaries`: SAEs held whole, by site; `dtype`: of the model.
    """
    token = torch.zeros(len(TOKEN), max_tokens, dtype=torch.int32, device=device)
    sequences = Sequences(layout, max_tokens, device)
    return [
        SiteBank(layout, site, width, max_tokens, token, sequences, dictionaries.get(site, {}), dtype)
        for site in layout.sites
    ]


def bytes_of(banks: Sequence[SiteBank]) -> int:
    """Bytes of the banks' buffers; those that all sites share count once."""
    buffers = {buffer.data_ptr(): buffer for bank in banks for buffer in bank.buffers()}
    return sum(buffer.nbytes for buffer in buffers.values())


def held_request(handle: int) -> str:
    """Return the id under which the driver keeps rows that are held without a request."""
    return f"held{handle}"


def handle_of(request_id: str) -> int | None:
    """Parse the server's handle, which it writes in front of the engine's request id.

    None for a request that is not the server's: vLLM's own, with which it warms up. Nor is PINNED_HANDLE a request's.
    """
    number = request_id.split("-", 1)[0]
    return int(number) or None if number.isdecimal() else None


def log_like_vllm() -> None:
    """Send log records of `rudder` to vLLM's handlers, unless this process has configured handlers for them.

    vLLM starts the engine process afresh, without the server's logging configuration, and sets up only its own loggers.
    """
    ours, vllm = logging.getLogger("rudder"), logging.getLogger("vllm")
    if not ours.hasHandlers():
        ours.handlers, ours.propagate = list(vllm.handlers), False
        ours.setLevel(vllm.level)
