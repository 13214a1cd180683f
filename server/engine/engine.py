"""The async engine around vLLM: the only door through which requests reach it."""

import asyncio
import secrets
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import enable_envs_cache
from vllm.inputs import TokensPrompt
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.sae import Normalisation, row_norms
from rudder.server import config as configuration
from rudder.server.engine.admission import Admission
from rudder.server.engine.call import Call, Outcome, Output, engine_sampling, salt
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.engine.telemetry.hub import Hub, Inbox
from rudder.server.monitoring.metrics import Metrics, PinnedFeature
from rudder.server.program import wire
from rudder.server.program.compile import Compiled, compile_program
from rudder.server.program.layout import Layout
from rudder.server.program.named import load_programs
from rudder.server.program.rows import Dictionary, Registry, check_capacity
from rudder.server.program.watch import compile_watch, with_watch
from rudder.v1 import program_pb2

TELEMETRY_TIMEOUT_S = 30.0
RELEASE_TIMEOUT_S = 0.5


@dataclass(frozen=True)
class ModelFacts:
    """What is served. `vocab_size` is the width of the logits."""

    name: str
    sha256: str
    hidden_size: int
    layers: int
    max_model_len: int
    vocab_size: int
    bos_token_id: int | None


@dataclass
class Engine:
    """A running vLLM engine with its bank, telemetry and admission."""

    llm: AsyncLLM
    model: ModelFacts
    registry: Registry
    bundles: dict[str, Bundle]
    programs: dict[str, tuple[program_pb2.Program, Compiled]]
    policy: Compiled | None
    admission: Admission
    hub: Hub
    epoch: str
    metrics: Metrics
    pinned: tuple[wire.Site, ...] = ()
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    handles: Any = field(default_factory=lambda: count(1))
    tasks: set["asyncio.Task[None]"] = field(default_factory=set)
    # Only this user can enter it, and it goes with the engine.
    folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="rudder-")
    )
    self_tested: bool = False

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; not to be used from two threads at once."""
        return self.llm.get_tokenizer()

    @property
    def healthy(self) -> bool:
        """Self-tested, alive, and no telemetry lost."""
        return self.self_tested and self.llm.is_running and not self.llm.errored and self.hub.lost is None

    @classmethod
    async def start(cls, config: configuration.Config, metrics: Metrics | None = None) -> "Engine":
        """Start vLLM with the bank, load the bundles, open the telemetry. `selftest.run` must pass before it serves."""
        metrics = metrics or Metrics.create()
        loop = asyncio.get_running_loop()
        served = await loop.run_in_executor(None, load_bundles, config)
        layout = layout_of(config, served)
        # The constructor returns when the engine process is up: health and signals are served meanwhile.
        llm = await loop.run_in_executor(None, lambda: AsyncLLM.from_engine_args(engine_args(config, layout)))
        try:
            engine = await loop.run_in_executor(None, cls.around, llm, layout, served, config, metrics)
            await engine.connect(config)
        except BaseException:
            llm.shutdown()
            raise
        # vLLM asks its environment at every token of every request. Its own processes keep the answers; so does this.
        enable_envs_cache()
        return engine

    @classmethod
    def around(
        cls, llm: AsyncLLM, layout: Layout, served: dict[str, Bundle], config: configuration.Config, metrics: Metrics
    ) -> "Engine":
        """What surrounds a running vLLM: everything checked against the model that it loaded."""
        model = model_facts(llm, config)
        for bundle in served.values():
            bundles.check_model(bundle, model.sha256, model.hidden_size)
        registry = registry_of(layout, model, served, config)
        programs = compiled_programs(config, registry)
        policy = programs[config.programs.always][1] if config.programs.always else None
        admission = Admission(layout, config.limits.queue)
        metrics.watch_admission(admission.usage)
        hub = Hub(metrics.feature_totals, admission.release)
        epoch = secrets.token_hex(8)
        return cls(llm, model, registry, served, programs, policy, admission, hub, epoch, metrics)

    async def connect(self, config: configuration.Config) -> None:
        """Open the telemetry channel and give the workers their bundles and pinned rows."""
        address = f"{self.folder.name}/telemetry"
        self.hub.bind(address)
        paths = {name: str(bundle.path) for name, bundle in self.bundles.items()}
        for loaded in await self.llm.collective_rpc("rudder_load", args=(paths,)):
            if loaded != {name: bundle.sha256 for name, bundle in self.bundles.items()}:
                raise bundles.BundleError("bundles: a worker loaded another bundle than the server")
        await self.llm.collective_rpc("rudder_connect", args=(address, self.hub.key))
        self.hub.channel.accept()
        self.spawn(self.listen())
        watched = [(site_of(w, self.bundles), row_of(w, self.bundles)) for w in config.watch]
        if watched:
            sites, columns = with_watch((), compile_watch(watched, self.registry, "watch"))
            self.pinned = sites
            request = self.padded(wire.Request(0, 0, False, (sites,)))
            self.admission.ledger.acquire(0, request)
            await self.llm.collective_rpc("rudder_pin", args=(wire.encode(request),))
            self.metrics.pin([self.pinned_feature(row.feature) for _, row in watched], columns)

    def pinned_feature(self, feature: program_pb2.Feature) -> PinnedFeature:
        """Name a feature that is counted in Prometheus, with its label."""
        manifest = self.bundles[feature.bundle].manifest
        label = self.bundles[feature.bundle].catalogue.get(feature.index).summary.label
        return PinnedFeature(manifest.name, manifest.site, feature.index, label)

    async def listen(self) -> None:
        """Take in telemetry until it is lost: then nobody has to wait for a place."""
        self.admission.fail(await self.hub.listen())

    def spawn(self, work: Any) -> None:
        """Run a task that lives no longer than the engine."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def stop(self) -> None:
        """Abort what runs and shut the engine down."""
        for task in self.tasks:
            task.cancel()
        self.llm.shutdown()

    def padded(self, request: wire.Request) -> wire.Request:
        """The request with as many stages as the bank has."""
        missing = self.registry.layout.stages - len(request.stages)
        stages = (*request.stages, *((),) * missing)
        return msgspec.structs.replace(request, stages=stages)

    def compile(self, call: Call) -> tuple[wire.Request, tuple[int, ...]]:
        """What the worker is told, and the column of each of `call.watch`."""
        registry = self.registry
        program = call.compiled.sites if call.compiled else ()
        sites, columns = with_watch(() if call.canary else program, call.watch)
        policy = self.policy.sites if self.policy else ()
        later = policy if call.canary is None else program if call.canary else ()
        limit = len(call.prompt_ids) + (call.sampling.max_tokens or 0)
        request = wire.Request(
            prompt_tokens=len(call.prompt_ids),
            max_tokens=min(limit, self.model.max_model_len),
            bos=call.prompt_ids[0] == self.model.bos_token_id,
            stages=(sites, later)[: registry.layout.stages],
            watch_prompt=call.report_prompt,
            top_k=call.top_k,
            top_k_sites=tuple(registry.layout.sites.index(site) for site in call.top_k_sites),
            capture=call.capture,
        )
        # What can never fit must be refused, or it would wait at the head of the queue for ever.
        check_capacity([*request.stages, self.pinned], registry, "report.features")
        return request, columns

    def require_alive(self) -> None:
        """Raises TelemetryLost or EngineDeadError where no call can end well any more."""
        if self.hub.lost:
            raise self.hub.lost
        if self.llm.errored:
            raise EngineDeadError

    async def stream(self, call: Call, on_abandoned: Callable[[Outcome], None] | None = None) -> AsyncGenerator[Output]:
        """Run a call. Closing or cancelling the iterator aborts it in the engine at once.

        `on_abandoned` gets the outcome so far of a call that ends without its last output, be it closed or failed.
        Raises QueueFull, TelemetryLost, EngineDeadError, ProgramError (more rows than a bank has places).
        """
        self.require_alive()
        handle = next(self.handles)
        request, columns = self.compile(call)
        order = None if columns == tuple(range(len(columns))) else columns
        started = time.monotonic()
        with self.hub.awaited():
            await self.admission.acquire(handle, request)
        queued_s = time.monotonic() - started
        inbox = self.hub.open(handle, request)
        request_id = f"{handle}-{secrets.token_hex(4)}"
        running: RequestOutputCollector | None = None
        ended = False
        generated = cached = 0
        outcome: Outcome | None = None
        try:
            prompt = TokensPrompt(
                prompt_token_ids=list(call.prompt_ids), cache_salt=salt(self.secret, call, self.policy)
            )
            # vLLM's `generate` would be one more generator to step through for every token.
            running = await self.llm.add_request(request_id, prompt, engine_sampling(call, request, self.policy))
            while not ended:
                out = running.get_nowait() or await running.get()
                choice = out.outputs[0]
                ids = choice.token_ids
                generated += len(ids)
                cached = max(cached, out.num_cached_tokens or 0)
                if choice.finish_reason:
                    ended = True
                    outcome = replace(await self.outcome(choice, inbox, call, generated, cached), queued_s=queued_s)
                    features = inbox.take().between(0, outcome.prompt_tokens + generated - 1)
                    yield Output(choice.text, ids, choice.logprobs, features.reordered(order), outcome)
                elif inbox.reports:
                    # One frame is of all requests: the first of them to ask takes it in for the others.
                    if inbox.covered < len(call.prompt_ids) + generated - 1:
                        self.hub.receive()
                    yield Output(choice.text, ids, choice.logprobs, inbox.take().reordered(order))
                else:
                    yield Output(choice.text, ids, choice.logprobs, inbox.nothing)
        finally:
            self.spawn(self.see_released(handle, inbox, request_id))
            if on_abandoned and outcome is None:
                self.hub.receive()
                outcome = outcome_before(inbox.covered, "abort", None, inbox, call, generated, cached)
                on_abandoned(replace(outcome, queued_s=queued_s))
            if running and not ended:
                await self.llm.abort(running.request_id, internal=True)

    async def outcome(self, choice: Any, inbox: Inbox, call: Call, generated: int, cached: int) -> Outcome:
        """How the call ended, once all of its telemetry has come."""
        # With asynchronous scheduling the engine may have run one token more than the answer has.
        last = len(call.prompt_ids) + generated - 1
        await self.covered(inbox, last)
        return outcome_before(last, choice.finish_reason, choice.stop_reason, inbox, call, generated, cached)

    async def covered(self, inbox: Inbox, position: int) -> None:
        """Wait until every token before `position` has been reported."""
        deadline = time.monotonic() + TELEMETRY_TIMEOUT_S
        self.hub.receive()
        with self.hub.awaited():
            while inbox.covered < position:
                self.hub.arrived.clear()
                self.require_alive()
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TelemetryLost(f"no telemetry for position {inbox.covered}")
                await happened(self.hub.arrived, min(remaining, 1.0))

    async def see_released(self, handle: int, inbox: Inbox, request_id: str) -> None:
        """Make sure that a request's places come back, also when it never reached the worker."""
        while not inbox.released.is_set() and not self.llm.errored:
            if await happened(inbox.released, RELEASE_TIMEOUT_S):
                return
            # A call cancelled while it was being handed over may run on unseen; the engine takes the abort first.
            await self.llm.abort(request_id)
            held = await self.llm.collective_rpc("rudder_holds", args=(handle,))
            if not any(held):
                # What it had sent before is still told apart by whose it was.
                self.hub.receive()
                self.hub.inboxes.pop(handle, None)
                self.admission.release(handle)
                return
        if self.llm.errored:
            self.admission.fail(EngineDeadError())


def outcome_before(
    end: int, finish_reason: str, stop_reason: str | int | None, inbox: Inbox, call: Call, generated: int, cached: int
) -> Outcome:
    """The outcome of a call whose telemetry counts up to the position `end`."""
    moved = inbox.moved_before(end)
    own = len(call.compiled.edits) if call.compiled else 0
    return Outcome(
        finish_reason, stop_reason, len(call.prompt_ids), generated, cached,
        moved=moved[:own], policy_moved=moved[own:],
        tokens_seen=max(0, min(inbox.covered, end) - max(inbox.first, 0)), captures=tuple(inbox.captures),
    )  # fmt: skip


async def happened(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, but not longer; whether it came."""
    waiter = asyncio.ensure_future(event.wait())
    await asyncio.wait([waiter], timeout=seconds)
    waiter.cancel()
    return event.is_set()


def load_bundles(config: configuration.Config) -> dict[str, Bundle]:
    """The configured bundles by name."""
    loaded = [bundles.load(Path(path)) for path in config.engine.bundles]
    names = [bundle.manifest.name for bundle in loaded]
    if len(set(names)) < len(names):
        raise configuration.ConfigError("engine.bundles", "two bundles have the same name")
    sites = [bundle.manifest.site for bundle in loaded]
    if len(set(sites)) < len(sites):
        raise configuration.ConfigError("engine.bundles", "two bundles are for the same site")
    return dict(zip(names, loaded, strict=True))


def layout_of(config: configuration.Config, served: dict[str, Bundle]) -> Layout:
    """The bank's shape: the bundles' sites and those named beside them."""
    engine = config.engine
    sites = dict.fromkeys([*(site for bundle in served.values() for site in bundle.manifest.sites), *engine.sites])
    whole = [(b.manifest.site, str(b.path.resolve()), b.sha256) for b in served.values() if kept_whole(b)]
    return Layout(
        tuple(sites), engine.rows, engine.slots, 2 if config.programs.always else 1, engine.window,
        engine.sequence_sites, engine.capture_tokens, tuple(whole),
    )  # fmt: skip


def kept_whole(bundle: Bundle) -> bool:
    """Whether rows do not tell the activations of this SAE, so that the bank needs all of it."""
    sae = bundle.sae
    return sae.router is None and (not sae.exact or sae.normalisation is not Normalisation.NONE)


def engine_args(config: configuration.Config, layout: Layout) -> AsyncEngineArgs:
    """vLLM's arguments, with the steering worker and the bank's shape in them."""
    from vllm.platforms import current_platform

    engine = config.engine
    on_cpu = engine.device == "cpu" or (engine.device == "auto" and current_platform.is_cpu())
    in_engine = on_cpu and engine.tensor_parallel_size == 1
    sizes = {"kv_cache_memory_bytes": engine.kv_cache_memory_bytes} if engine.kv_cache_memory_bytes else {}
    return AsyncEngineArgs(
        model=engine.model,
        dtype=engine.dtype,
        load_format=engine.load_format,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        enforce_eager=engine.enforce_eager,
        tensor_parallel_size=engine.tensor_parallel_size,
        distributed_executor_backend="rudder.server.engine.worker.executor.InEngineProcess" if in_engine else None,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        worker_cls=f"rudder.server.engine.worker.{'cpu' if on_cpu else 'gpu'}.Worker",
        additional_config=layout.additional_config(),
        disable_log_stats=False,
        **sizes,
    )


def model_facts(llm: AsyncLLM, config: configuration.Config) -> ModelFacts:
    """What vLLM says of the model, and its hash."""
    model = llm.model_config
    folder = Path(model.model)
    return ModelFacts(
        name=folder.name or model.model,
        sha256=bundles.model_sha256(folder) if folder.is_dir() and config.engine.load_format != "dummy" else "",
        hidden_size=model.get_hidden_size(),
        layers=model.hf_text_config.num_hidden_layers,
        max_model_len=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        bos_token_id=llm.get_tokenizer().bos_token_id,
    )


def registry_of(layout: Layout, model: ModelFacts, served: dict[str, Bundle], config: configuration.Config) -> Registry:
    """What compiling a program needs to know."""
    dictionaries = {name: dictionary_of(bundle) for name, bundle in served.items()}
    return Registry(layout, model.hidden_size, dictionaries, max_edits=config.limits.max_edits)


def dictionary_of(bundle: Bundle) -> Dictionary:
    """What compiling a program needs to know of a bundle."""
    manifest, statistics = bundle.manifest, bundle.statistics if bundle.measured else None
    routed = "a routed SAE decides its layer from all of them: ask for its strongest latents"
    elsewhere = "writes to many layers" if manifest.partial else f"explains {manifest.output_site}"
    transcoder = f"it reads {manifest.site} and {elsewhere}: it can be watched, not edited"
    return Dictionary(
        name=manifest.name, site=manifest.site, sha256=bundle.sha256, latents=manifest.latents,
        max_activation=statistics.max_activation.numpy() if statistics else None,
        decoder_norm=row_norms(bundle.sae.decoder).numpy(),
        mean=statistics.mean.numpy().astype(np.float32) if statistics else None,
        watched_only=transcoder if manifest.transcodes or manifest.partial else "",
        whole_only=routed if bundle.sae.router else "",
    )  # fmt: skip


def compiled_programs(
    config: configuration.Config, registry: Registry
) -> dict[str, tuple[program_pb2.Program, Compiled]]:
    """The operator's programs, each compiled: one that does not fit stops the start."""
    folder = config.programs.folder
    programs = load_programs(Path(folder)) if folder else {}
    always = config.programs.always
    if always and always not in programs:
        raise configuration.ConfigError("programs.always", f"{always!r} is not in {folder}")
    return {
        name: (program, compile_program(program, registry, policy=name == always, field=name))
        for name, program in programs.items()
    }


def site_of(watched: configuration.WatchedFeature, served: dict[str, Bundle]) -> str:
    """The site of a feature counted in Prometheus."""
    return watched.site or served[watched.bundle or next(iter(served))].manifest.site


def row_of(watched: configuration.WatchedFeature, served: dict[str, Bundle]) -> program_pb2.Row:
    """Its row."""
    bundle = watched.bundle or next(iter(served))
    return program_pb2.Row(feature=program_pb2.Feature(bundle=bundle, index=watched.index))
