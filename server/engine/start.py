"""Start an engine from a configuration: everything is checked against the model that vLLM loaded."""

import asyncio
import json
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import numpy as np

from rudder.sae_models import concepts
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.concepts import ConceptError, Concepts
from rudder.sae_models.sae import Normalisation, row_norms
from rudder.sae_models.token_model import vocabulary_sha256
from rudder.sae_models.tokens import text_encoder
from rudder.server import preflight
from rudder.server.config import Config, ConfigError
from rudder.server.engine import adapter
from rudder.server.engine.adapter import AsyncLLM
from rudder.server.engine.admission import Admission
from rudder.server.engine.engine import Engine
from rudder.server.engine.ledger import PINNED_HANDLE
from rudder.server.engine.telemetry.hub import Hub
from rudder.server.engine.traced import code_digest
from rudder.server.monitoring.collectors import PinnedFeature
from rudder.server.monitoring.logs import fields
from rudder.server.monitoring.metrics import Metrics
from rudder.server.program import wire
from rudder.server.program.compile import compile_program
from rudder.server.program.exclusion import Exclusion
from rudder.server.program.layout import Layout
from rudder.server.program.named import NamedProgram, load_programs
from rudder.server.program.rows import Dictionary, Registry, check_capacity
from rudder.server.program.watch import compile_watch, merge_watched
from rudder.v1 import program_pb2

T = TypeVar("T")
# Time for vLLM to notice that its engine process was killed.
ABANDON_S = 30.0

logger = logging.getLogger(__name__)


def no_check(_: Registry) -> None:
    """Check nothing."""


async def start_engine(
    config: Config, metrics: Metrics | None = None, check: Callable[[Registry], None] = no_check
) -> Engine:
    """Start vLLM with the bank, load bundles and programs, and connect telemetry.

    `check` is called before vLLM is started, and raises if what the caller will load cannot be served. `selftest.run`
    must pass before the engine serves. A start that fails or is cancelled shuts vLLM down. Raises ConfigError,
    BundleError, ProgramFileError, ProgramError, ConceptError, EngineStartError, and what `check` raises.
    """
    loop = asyncio.get_running_loop()
    adapter.check_limits(config.limits)
    config = await loop.run_in_executor(None, preflight.check, config)
    served = await loop.run_in_executor(None, load_bundles, config)
    layout = layout_of(config, served)
    if served:
        await loop.run_in_executor(None, check_programs, layout, served, config, check)
    llm = await start_llm(config, layout)
    try:
        engine = await loop.run_in_executor(
            None, build_engine, llm, layout, served, config, metrics or Metrics.create()
        )
        await connect_telemetry(engine)
        await pin_features(engine, watched_rows(config, engine.bundles))
    except BaseException:
        llm.shutdown()
        raise
    engine.spawn(engine.listen())
    engine.spawn(engine.watch_progress(config.engine.stall_s, config.engine.stall_kill_s))
    # vLLM reads its environment variables for every token of every request; its own processes cache them, too.
    adapter.enable_envs_cache()
    return engine


async def start_llm(config: Config, layout: Layout) -> AsyncLLM:
    """Start vLLM in a thread, so that health checks and signals are served meanwhile.

    Raises EngineStartError, also if it has not started after `engine.start_timeout_s`.
    """
    others = set(multiprocessing.active_children())
    starting = in_lasting_thread(partial(adapter.start_llm, config, layout))
    timeout_s = config.engine.start_timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(starting)
    except TimeoutError:
        await abandon(starting, others)
        problem = f"the engine did not start within engine.start_timeout_s, {timeout_s:g} s"
        raise adapter.EngineStartError(problem) from None
    except asyncio.CancelledError:
        await abandon(starting, others)
        raise


def in_lasting_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """Run `work` in a thread that nothing waits for and that never ends: the kernel ends a process with the thread that
    started it.
    """
    result: Future[T] = Future()
    # Whoever waits may be cancelled; the work goes on.
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)
        threading.Event().wait()

    threading.Thread(target=run, name="engine-start", daemon=True).start()
    return asyncio.wrap_future(result)


async def abandon(starting: "asyncio.Future[AsyncLLM]", others: Set[BaseProcess]) -> None:
    """End a start of vLLM: its thread cannot be cancelled, but fails without its process, which is not of `others`.

    A thread that does not end for ABANDON_S is left behind.
    """
    deadline = time.monotonic() + ABANDON_S
    while not starting.done() and time.monotonic() < deadline:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        await asyncio.wait([starting], timeout=0.1)
    if starting.done() and not starting.exception():
        starting.result().shutdown()


def check_programs(
    layout: Layout, served: dict[str, Bundle], config: Config, check: Callable[[Registry], None]
) -> None:
    """Compile all programs and watched features, as `build_engine` does once the model is loaded, and call `check`.

    Raises ProgramFileError, ProgramError, ConceptError.
    """
    load_concepts(served)
    width = next(iter(served.values())).manifest.model.hidden_size
    registry = registry_of(layout, width, served, config)
    compile_folder(config.programs.folder, registry, "program")
    pinned, _ = merge_watched((), compile_watch(watched_rows(config, served), registry, "watch"))
    check_capacity([pinned], registry, "watch")
    check(registry)


def build_engine(llm: AsyncLLM, layout: Layout, served: dict[str, Bundle], config: Config, metrics: Metrics) -> Engine:
    """Build what surrounds a running vLLM."""
    model = adapter.model_facts(llm, config.engine.load_format)
    adapter.check_limits(config.limits, len(adapter.eos_token_ids(llm)))
    # Built now, as it copies the vocabulary, and not in the first request.
    encoder = text_encoder(llm.get_tokenizer())
    for bundle in served.values():
        bundles.check_model(bundle, model.sha256, model.hidden_size)
        check_bos(bundle, adds_bos=bool(encoder.bos))
    registry = registry_of(layout, model.hidden_size, served, config)
    if config.policies.folder or config.policies.allow_apply:
        registry = replace(registry, vocabulary=vocabulary_sha256(llm.get_tokenizer().get_vocab()))
    programs = compile_folder(config.programs.folder, registry, "program")
    limits = config.limits
    admission = Admission(
        layout,
        limits.queue,
        running=config.engine.max_num_seqs,
        caller_share=limits.caller_share,
        max_wait_s=limits.max_wait_s,
        policy_rows=min(config.policies.rows, config.engine.rows - 1),
    )
    metrics.watch_admission(admission.usage)
    hub = Hub(metrics.feature_totals, admission.release)
    engine = Engine(llm, model, registry, served, programs, admission, hub, metrics, concepts=load_concepts(served))
    if engine.exclusion != Exclusion():
        values = fields(positions=len(engine.exclusion.positions), tokens=len(engine.exclusion.tokens))
        logger.info("left out of reading, statistics and edits: the SAEs were not trained on them", extra=values)
    return engine


def check_bos(bundle: Bundle, adds_bos: bool) -> None:
    """Warn if an SAE was trained on contexts that begin otherwise than texts of this server, which is worth knowing."""
    trained = bundle.manifest.context.prepend_bos
    if trained is not None and trained != adds_bos:
        values = fields(bundle=bundle.manifest.name, trained_with_bos=trained, tokenizer_adds_bos=adds_bos)
        logger.warning("the SAE was trained with another rule for BOS than the tokenizer's", extra=values)


async def connect_telemetry(engine: Engine) -> None:
    """Open the telemetry channel.

    Raises BundleError if the workers loaded other bundles than the server, ConfigError if they have other banks.
    """
    await require_same_banks(engine)
    address = f"{engine.folder.name}/telemetry"
    engine.hub.bind(address)
    for loaded in await adapter.call_workers(engine.llm, "rudder_bundles"):
        if loaded != {name: bundle.sha256 for name, bundle in engine.bundles.items()}:
            raise bundles.BundleError("bundles: a worker loaded another bundle than the server")
    await adapter.call_workers(engine.llm, "rudder_connect", address, engine.hub.key)
    engine.hub.channel.accept()


async def require_same_banks(engine: Engine) -> None:
    """Raise ConfigError if a machine was started with another configuration: its banks would differ silently."""
    expected = json.dumps(engine.registry.layout.additional_config(code_digest()), sort_keys=True)
    if any(found != expected for found in await adapter.call_workers(engine.llm, "rudder_layout")):
        problem = "a machine has another configuration of the bank, other bundles, or another version of Rudder"
        raise ConfigError("engine.nodes", problem)


async def pin_features(engine: Engine, features: Sequence[tuple[str, program_pb2.Row]]) -> None:
    """Hold the rows of these features, as (site, row), as long as the engine lives, and count their activations.

    Once requests run, the features must stay as they are.
    """
    pinned, columns = merge_watched((), compile_watch(features, engine.registry, "watch"))
    if not pinned:
        return
    check_capacity([pinned], engine.registry, "watch")
    request = wire.Request(0, 0, False, (pinned,))
    engine.admission.unreserve(PINNED_HANDLE)
    engine.admission.reserve(PINNED_HANDLE, request)
    await adapter.call_workers(engine.llm, "rudder_pin", wire.encode(request))
    engine.metrics.pin([pinned_feature(row.feature, engine.bundles) for _, row in features], columns)


def pinned_feature(feature: program_pb2.Feature, served: dict[str, Bundle]) -> PinnedFeature:
    """Name a feature that is counted over all requests, with its label."""
    manifest = served[feature.bundle].manifest
    label = served[feature.bundle].catalogue.get(feature.index).summary.label
    return PinnedFeature(manifest.name, manifest.site, feature.index, label)


def load_bundles(config: Config) -> dict[str, Bundle]:
    """Load the configured bundles, by name. The first of a site is the one that is meant where none is named."""
    loaded = [bundles.load(Path(path)) for path in config.engine.bundles]
    names = [bundle.manifest.name for bundle in loaded]
    if len(set(names)) < len(names):
        raise ConfigError("engine.bundles", "two bundles have the same name")
    return dict(zip(names, loaded, strict=True))


def load_concepts(served: dict[str, Bundle]) -> dict[str, Concepts]:
    """Load the steering concepts of the bundles that have some. ConceptError: they are of another bundle or model."""
    files = {name: bundle.path / concepts.FILE for name, bundle in served.items()}
    return {name: concepts_of(served[name], file) for name, file in files.items() if file.is_file()}


def concepts_of(bundle: Bundle, file: Path) -> Concepts:
    """Read the steering concepts of a bundle. ConceptError: they are of another one."""
    content, manifest = concepts.read(file), bundle.manifest
    if problem := concepts.fits(content, manifest.name, manifest.site, manifest.model.sha256, manifest.files):
        raise ConceptError(f"{file}: {problem}")
    rows = (row for concept in content.concepts for candidate in concept.candidates for row in candidate.rows)
    if unknown := [row.index for row in rows if not 0 <= row.index < manifest.latents]:
        raise ConceptError(f"{file}: {manifest.name} has latents 0 to {manifest.latents - 1}, not {unknown[0]}")
    return content


def layout_of(config: Config, served: dict[str, Bundle]) -> Layout:
    """Build the bank's layout: the sites of the bundles and of the configuration, and one more stage per policy."""
    engine = config.engine
    sites = dict.fromkeys([*(site for bundle in served.values() for site in bundle.manifest.sites), *engine.sites])
    whole = [(b.manifest.site, str(b.path.resolve()), b.sha256) for b in served.values() if needs_whole_dictionary(b)]
    loaded = [(name, str(bundle.path.resolve()), bundle.sha256) for name, bundle in served.items()]
    return Layout(
        tuple(sites), engine.rows, engine.slots, 1 + config.policies.stages, engine.window,
        engine.sequence_sites, engine.capture_tokens, tuple(whole), tuple(loaded), engine.bank_backend,
    )  # fmt: skip


def needs_whole_dictionary(bundle: Bundle) -> bool:
    """Return whether the activations of this SAE depend on more than their own rows."""
    sae = bundle.sae
    return sae.router is None and (not sae.exact or sae.normalisation is not Normalisation.NONE)


def registry_of(layout: Layout, width: int, served: dict[str, Bundle], config: Config) -> Registry:
    """Build what programs are compiled against."""
    dictionaries = {name: dictionary_of(bundle) for name, bundle in served.items()}
    return Registry(
        layout,
        width,
        dictionaries,
        max_edits=config.limits.max_edits,
        step_tokens=config.engine.max_num_batched_tokens,
        request_share=config.limits.request_share,
        max_name_chars=config.limits.max_name_chars,
    )


def dictionary_of(bundle: Bundle) -> Dictionary:
    """Build the dictionary of a bundle."""
    manifest, statistics = bundle.manifest, bundle.statistics if bundle.measured else None
    routed = "a routed SAE decides its layer from all of them: ask for its strongest latents"
    elsewhere = "writes to many layers" if manifest.partial else f"explains {manifest.output_site}"
    transcoder = f"it reads {manifest.site} and {elsewhere}: it can be watched, not edited"
    return Dictionary(
        name=manifest.name, site=manifest.site, sha256=bundle.sha256, latents=manifest.latents,
        max_activation=statistics.max_activation.numpy() if statistics else None,
        decoder_norm=row_norms(bundle.sae.decoder).numpy(),
        mean=statistics.mean.numpy().astype(np.float32) if statistics else None,
        vectors=lambda at: [weights[at].float().numpy() for weights in (bundle.sae.encoder, bundle.sae.decoder)],
        watched_only=transcoder if manifest.transcodes or manifest.partial else "",
        whole_only=routed if bundle.sae.router else "",
    )  # fmt: skip


def compile_folder(folder: str | None, registry: Registry, kind: str) -> dict[str, NamedProgram]:
    """Compile the programs of a folder, with no row locked.

    Raises ProgramFileError, and ProgramError whose field begins with `kind` and the name.
    """
    messages = load_programs(Path(folder)) if folder else {}
    return {
        name: NamedProgram(message, compile_program(message, registry, field=f"{kind} {name}"))
        for name, message in messages.items()
    }


def watched_rows(config: Config, served: dict[str, Bundle]) -> list[tuple[str, program_pb2.Row]]:
    """Return the pinned features as (site, row). Raises ConfigError if one is of no bundle that is served."""
    rows = []
    for number, watched in enumerate(config.watch):
        bundle = preflight.watched_bundle(watched, tuple(served), number)
        row = program_pb2.Row(feature=program_pb2.Feature(bundle=bundle, index=watched.index))
        rows.append((watched.site or served[bundle].manifest.site, row))
    return rows
