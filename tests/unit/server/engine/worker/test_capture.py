"""Reading residuals with little room for them: never beyond the buffers, and the same as with room for all."""

from random import Random
from sys import maxsize

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.sae_models.sparse.screening import prepare_screening
from rudder.server.engine.ledger import Ledger
from rudder.server.engine.telemetry.hub import Features, Hub, Inbox
from rudder.server.engine.worker.driver import Driver
from rudder.server.engine.worker.reader import Readable, Reader
from rudder.server.engine.worker.worker import build_banks
from rudder.server.program import wire
from rudder.server.program.errors import ProgramError
from rudder.server.program.layout import Layout
from rudder.server.program.rows import Registry, check_capture
from tests.unit.reference import BUNDLE, WIDTH, grid, toy_sae

SITE = "layers.0.resid_post"
K = 3
PADDING = 2


class Worker:
    """A driver and a reader over banks with room for `capture_tokens`, and the server's end of their frames."""

    def __init__(self, capture_tokens: int | None, step_tokens: int) -> None:
        sae, layout = toy_sae(Random(0)), Layout((SITE,), rows=8, slots=4, capture_tokens=capture_tokens)
        self.driver = Driver(layout, build_banks(layout, WIDTH, step_tokens + PADDING + 1, torch.device("cpu")))
        self.driver.load_sae(BUNDLE, sae)
        self.reader = Reader(self.driver.banks)
        self.reader.dictionaries[0] = Readable(prepare_screening(sae), [0])
        self.registry = Registry(layout, WIDTH, {}, step_tokens=step_tokens)
        self.admission = Ledger(layout)
        self.hub = Hub(lambda _: None, lambda _: None)
        self.inboxes: dict[str, Inbox] = {}
        self.frames = 0

    def admit(self, request_id: str, handle: int, request: wire.Request) -> bool:
        """Whether the server and the worker take the request now."""
        if isinstance(self.admission.try_acquire(handle, request), str):
            return False
        self.driver.admit(request_id, handle, request)
        self.inboxes[request_id] = self.hub.open(handle, request)
        return True

    def step(self, parts: list[tuple[str, int, int]], xs: dict[str, torch.Tensor]) -> None:
        """Run (request, start, tokens) in batch order."""
        starts, lengths = (np.array([part[i] for part in parts], np.int64) for i in (1, 2))
        self.driver.write_token_metadata([part[0] for part in parts], starts, lengths)
        x = torch.cat([*(xs[i][start : start + length] for i, start, length in parts), torch.zeros(PADDING, WIDTH)])
        for bank in self.driver.banks:
            bank(x)
        self.hub.take(self.reader.read(self.driver.step, ()).frame(self.frames))
        self.frames += 1

    def features(self) -> dict[str, Features]:
        """Return what each request was reported."""
        return {request_id: inbox.take(maxsize) for request_id, inbox in self.inboxes.items()}


def reading(rng: Random, step_tokens: int) -> wire.Request:
    """A request that reports its strongest latents, at its prompt too or not, or captures residuals."""
    prompt = rng.randint(1, 2 * step_tokens)
    whole = rng.random() < 0.6
    capture = rng.random() < 0.3
    sites = () if capture else (0,)
    top_k = 0 if capture else K
    return wire.Request(prompt, prompt + rng.randint(1, 12), True, ((),), whole and not capture, top_k, sites, capture)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 24), st.integers(1, 24))
def test_reads_with_little_room_equal_those_with_room_for_all(seed: int, capture_tokens: int, step_tokens: int) -> None:
    """Over prompts, chunks, preemptions and batches: what is admitted never leaves the buffers."""
    rng = Random(seed)
    small, large = Worker(capture_tokens, step_tokens), Worker(None, step_tokens)
    requests: dict[str, wire.Request] = {}
    for handle in range(1, 5):
        request = reading(rng, step_tokens)
        reads_prompt = request.watch_prompt or request.capture
        if reads_prompt and min(request.prompt_tokens, step_tokens) > capture_tokens:
            with pytest.raises(ProgramError):
                check_capture(request, small.registry, "report.top_k")
            continue
        check_capture(request, small.registry, "report.top_k")
        if small.admit(f"r{handle}", handle, request):
            assert large.admit(f"r{handle}", handle, request)
            requests[f"r{handle}"] = request
    xs = {name: torch.tensor(grid(rng, r.max_tokens, WIDTH, top=4)).float() for name, r in requests.items()}
    at = dict.fromkeys(requests, 0)
    while any(at[name] < request.max_tokens for name, request in requests.items()):
        running = [name for name, request in requests.items() if at[name] < request.max_tokens]
        rng.shuffle(running)
        if rng.random() < 0.1:
            # Preempted, to go on from the start or from where the prefix cache ends.
            at[running[0]] = rng.randint(0, at[running[0]])
        left, parts = step_tokens, []
        for name in running[: rng.randint(1, len(running))]:
            request = requests[name]
            # After a preemption, generated tokens run in chunks like prompt tokens.
            known = max(request.prompt_tokens, small.inboxes[name].delivered or at[name] + 1)
            length = min(max(1, known - at[name]), left, request.max_tokens - at[name])
            if length > 0:
                parts.append((name, at[name], length if rng.random() < 0.7 else rng.randint(1, length)))
                left -= parts[-1][2]
        for worker in (small, large):
            worker.step(parts, xs)
        at |= {name: start + length for name, start, length in parts}
    for name, features in small.features().items():
        expected = large.inboxes[name].take(maxsize)
        assert features.first == expected.first
        assert np.array_equal(features.top_latents, expected.top_latents)
        assert np.array_equal(features.top_values, expected.top_values)
        residuals = [b"".join(c.before for c in worker.inboxes[name].captures) for worker in (small, large)]
        assert residuals[0] == residuals[1]
        if requests[name].capture:
            assert residuals[0] == xs[name].numpy().astype("<f4").tobytes()


def test_a_prompt_that_does_not_fit_is_refused_by_name() -> None:
    registry = Registry(Layout((SITE,), capture_tokens=32), WIDTH, {}, step_tokens=2048)
    long = wire.Request(90, 95, True, ((),), True, K, (0,))
    with pytest.raises(
        ProgramError, match=r"^report\.top_k: a step may read 90 tokens .*\.capture_tokens has room for 32"
    ):
        check_capture(long, registry, "report.top_k")
    for request in (
        wire.Request(32, 95, True, ((),), True, K, (0,)),
        wire.Request(90, 95, True, ((),), False, K, (0,)),
    ):
        check_capture(request, registry, "report.top_k")
    # In chunks of 16 tokens it fits.
    check_capture(long, Registry(registry.layout, WIDTH, {}, step_tokens=16), "report.top_k")


def test_a_token_that_is_not_finite_has_no_strongest_latents() -> None:
    worker = Worker(None, 8)
    assert worker.admit("a", 1, wire.Request(3, 4, False, ((),), True, K, (0,)))
    x = torch.ones(4, WIDTH)
    x[1], x[2, 0] = torch.inf, torch.nan
    worker.step([("a", 0, 4)], {"a": x})
    features = worker.features()["a"]
    assert not features.top_values[1:3].any()
    assert np.array_equal(features.top_values[0], features.top_values[3])
    assert features.top_values[0].any()
