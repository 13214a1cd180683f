"""The first layer: messages through decoding, checks and admission of a server without an engine process.

All of the server process is real, the shipped model's tokenizer and bundle included; of vLLM there is no more than the
classes of its parameters.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig
from vllm.tokenizers import get_tokenizer

from rudder.server import config, preflight
from rudder.server.config import Config
from rudder.server.engine import start
from rudder.server.engine.adapter import ModelFacts
from rudder.server.engine.admission import Admission
from rudder.server.engine.call import engine_sampling
from rudder.server.engine.engine import Engine
from rudder.server.engine.telemetry.hub import Hub
from rudder.server.identity.authenticator import Credentials
from rudder.server.monitoring.metrics import Metrics
from rudder.server.monitoring.traces import Correlation
from rudder.server.program import wire
from rudder.server.safety.start import with_stages
from rudder.server.service import catalogue, inference, ledger, model, policies
from rudder.server.service.call import begin_call
from rudder.server.service.errors import Refusal
from rudder.server.service.prepare import prepare
from rudder.server.service.quotas import Demand, demand_of
from rudder.server.service.record import CallRecord
from rudder.server.service.serving import Serving
from tests.fuzz.cases import Case

SLOW_S = 5.0


class NoEngine:
    """What the server process asks of vLLM, without an engine process."""

    errored, is_running = False, True

    def __init__(self, folder: str) -> None:
        self.tokenizer = get_tokenizer(folder)
        self.model_config: Any = SimpleNamespace(try_get_generation_config=dict)

    def get_tokenizer(self) -> Any:
        """The tokenizer of the shipped model."""
        return self.tokenizer

    async def collective_rpc(self, *_: Any, **__: Any) -> list[int]:
        """The worker holds nothing."""
        return [0]

    async def abort(self, *_: Any, **__: Any) -> None:
        """Nothing runs."""

    def shutdown(self) -> None:
        """Nothing runs."""


def serving_without_engine(loaded: Config | None = None) -> Serving:
    """Build a server around no engine."""
    checked = with_stages(preflight.check(loaded or config.load(overrides={"policies.stages": "1"})), {})
    served = start.load_bundles(checked)
    layout, llm = start.layout_of(checked, served), NoEngine(checked.engine.model)
    shape = AutoConfig.from_pretrained(checked.engine.model)
    facts = ModelFacts(
        Path(checked.engine.model).name, "", shape.hidden_size, shape.num_hidden_layers,
        shape.max_position_embeddings, shape.vocab_size, llm.tokenizer.bos_token_id,
    )  # fmt: skip
    registry = start.registry_of(layout, facts.hidden_size, served, checked)
    programs = start.compile_folder(checked.programs.folder, registry, "program")
    admission, metrics = Admission(layout, checked.limits.queue, running=checked.engine.max_num_seqs), Metrics.create()
    engine = Engine(
        llm, facts, registry, served, programs, admission, Hub(lambda _: None, admission.release), metrics,
        concepts=start.load_concepts(served), self_tested=True,
    )  # fmt: skip
    return Serving.around(engine, checked, metrics)


def known_values(serving: Serving) -> dict[str, list[Any]]:
    """Return values by name of a field with which a request gets far."""
    engine = serving.engine
    return {
        "site": [*engine.registry.layout.sites, "layers.0.resid_post"],
        "bundle": ["", *engine.bundles],
        "index": [0, 1, 7, 12, 100],
        "ids": [1, 2, 5, 9, 100],
        "role": ["user", "assistant", "system"],
        "max_tokens": [1, 2, 3],
        "name": [*engine.programs, "x"],
        "topic": [c.name for concepts in engine.concepts.values() for c in concepts.concepts] or ["x"],
        "n": [1, 2],
    }


async def admit(serving: Serving, record: CallRecord, request: Any) -> None:
    """Take a request as far as vLLM: check, compile, tokenise, hold quotas and the bank."""
    job = await prepare(serving, record.caller, request, record.binding)
    with serving.quotas.reserved(record.caller, demand_of(job.calls), lambda: Demand(0, 0, 0, 0)):
        for call in job.calls:
            handle = next(serving.engine.handles)
            compiled, _ = serving.engine.compile(call)
            await serving.engine.admission.acquire(handle, compiled, call.caller.share_key)
            try:
                engine_sampling(call, compiled)
                wire.decode(wire.encode(compiled))
            finally:
                serving.engine.admission.release(handle)


Handler = Callable[[Serving, CallRecord, Any], Awaitable[object]]


async def at_once(value: object) -> object:
    """Return a value, as a coroutine does."""
    return value


HANDLERS: dict[str, Handler] = {
    "InferenceService.Generate": admit,
    "InferenceService.Complete": admit,
    "InferenceService.Inspect": admit,
    "InferenceService.Tokenize": inference.tokenize,
    "FeatureService.Get": lambda serving, _, request: catalogue.get_feature(serving, request),
    "FeatureService.List": lambda serving, _, request: catalogue.list_features(serving, request),
    "FeatureService.Search": lambda serving, _, request: catalogue.search_features(serving, request),
    "ModelService.Get": lambda serving, _, __: at_once(model.get_model(serving)),
    "ModelService.ListPrograms": lambda serving, _, __: at_once(model.list_programs(serving)),
    "PolicyService.List": lambda serving, _, __: at_once(policies.list_policies(serving)),
    "PolicyService.Get": lambda serving, _, request: at_once(policies.get_policy(serving, request)),
    "PolicyService.Validate": lambda serving, _, request: policies.validate(serving, request),
    "PolicyService.Apply": lambda serving, record, request: policies.apply(serving, record.caller, request),
    "PolicyService.Explain": lambda serving, record, request: at_once(
        policies.explain(serving, record.caller, request)
    ),
    "DebugService.GetLedger": lambda serving, record, _: at_once(ledger.held_by_server(serving, record)),
}


@dataclass
class Result:
    """What a run found. `outcomes`: how many messages ended so; `crashes`: cases that ended INTERNAL or too late."""

    messages: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: list[Case] = field(default_factory=list)
    held: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing crashed and nothing is held."""
        return not self.crashes and not any(self.held.values())


async def outcome_of(serving: Serving, case: Case) -> str:
    """Return how a call with these bytes ends."""
    origin = Credentials(origin="fuzz")
    try:
        async with (
            asyncio.timeout(SLOW_S),
            begin_call(serving, case.method.name, origin, len(case.data), Correlation()) as record,
        ):
            with serving.pending.held(len(case.data)):
                request = case.method.request.FromString(case.data)
                await HANDLERS[case.method.name](serving, record, request)
    except Refusal as refusal:
        return refusal.reason
    except TimeoutError:
        return "SLOW"
    return "OK"


async def run(serving: Serving, cases: Iterable[Case], on_progress: Callable[[int], None] = lambda _: None) -> Result:
    """Give every case to a server; nothing may end INTERNAL, take longer than SLOW_S, or leave something held."""
    result, began = Result(), time.monotonic()
    for case in cases:
        started = time.monotonic()
        outcome = await outcome_of(serving, case)
        result.slowest_s = max(result.slowest_s, time.monotonic() - started)
        result.outcomes[outcome] += 1
        result.messages += 1
        if outcome in ("INTERNAL", "SLOW"):
            result.crashes.append(case)
        on_progress(result.messages)
    result.seconds = time.monotonic() - began
    held = ledger.held_by_server(serving, CallRecord("", serving.authenticator.caller(Credentials()), Correlation()))
    # The ledger leaves out the call that asks for it; here is none.
    result.held = {**held, "calls": float(len(serving.calls))}
    return result
