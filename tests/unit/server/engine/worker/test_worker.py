"""The worker's logging, the size of its banks, and the handles in request ids."""

import logging
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import bundle as bundles
from rudder.server.engine.admission import Admission
from rudder.server.engine.worker.reader import Reader
from rudder.server.engine.worker.worker import (
    SteeringWorker,
    build_banks,
    bytes_of,
    handle_of,
    load_bundle,
    log_like_vllm,
)
from rudder.server.program import wire
from rudder.server.program.layout import Layout
from tests.unit.reference import BUNDLE, make_driver, toy_sae


def test_logs_go_to_vllms_handlers_only_where_none_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, vllm = logging.getLogger("rudder"), logging.getLogger("vllm")
    handler = logging.NullHandler()
    monkeypatch.setattr(vllm, "handlers", [handler])
    monkeypatch.setattr(vllm, "level", logging.INFO)
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(ours, name, getattr(ours, name))
    log_like_vllm()
    assert handler not in ours.handlers, "pytest has configured the root logger"
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    log_like_vllm()
    assert ours.handlers == [handler]
    assert (ours.level, ours.propagate) == (logging.INFO, False)


def test_shared_buffers_count_once() -> None:
    def size(*sites: str) -> int:
        return bytes_of(build_banks(Layout(sites, rows=4, slots=2), 8, 9, torch.device("cpu")))

    banks = build_banks(Layout(("layers.0.mlp_out",), rows=4, slots=2), 8, 9, torch.device("cpu"))
    shared = banks[0].token.nbytes + sum(buffer.nbytes for buffer in banks[0].sequences.buffers())
    assert size("layers.0.mlp_out", "layers.1.mlp_out") == 2 * size("layers.0.mlp_out") - shared


def test_handles_are_read_from_request_ids() -> None:
    ids = ("17-ab", "warmup", "x-3", "_v2_mixed_warmup_decode_", "held0", "0-ab", "0", "", "-1")
    assert [handle_of(request_id) for request_id in ids] == [17] + 8 * [None]


def finished(*request_ids: str) -> Any:
    """A scheduler's output in which these requests ended."""
    return SimpleNamespace(finished_req_ids=set(request_ids), scheduled_new_reqs=[])


def test_the_end_of_a_request_that_is_not_the_servers_releases_nothing() -> None:
    """vLLM's V2 runner warms up with requests of its own, whose end must not release the rows of pinned features."""
    worker = SteeringWorker()
    worker.driver = make_driver(Layout(("layers.0.resid_post",), rows=4, slots=2), toy_sae(Random(0)))
    worker.reader = Reader(worker.driver.banks)
    watched = wire.Site(0, (wire.Row(BUNDLE, 1),), watch=(0,))
    worker.rudder_pin(wire.encode(wire.Request(0, 0, False, ((watched,),))))
    server = Admission(worker.driver.layout, limit=1)
    server.ledger.acquire(0, wire.Request(0, 0, False, ((watched,),)))
    for ids in (("_v2_mixed_warmup_decode_", "_v2_mixed_warmup_prefill_"), ("held0-1", "0-ab", "7-cd")):
        for handle in worker.update_requests(finished(*ids)):
            server.release(handle)
    assert worker.rudder_usage()["rows"] == [1]
    assert server.ledger.rows_used(0) == 1


def test_rows_are_held_until_they_are_dropped_and_by_requests_until_they_end() -> None:
    worker = SteeringWorker()
    driver = worker.driver = make_driver(Layout(("layers.0.resid_post",), rows=4, slots=2), toy_sae(Random(0)))
    worker.reader = Reader(driver.banks)

    def holding(*latents: int, watch: tuple[int, ...] = ()) -> bytes:
        rows = tuple(wire.Row(BUNDLE, latent) for latent in latents)
        return wire.encode(wire.Request(0, 0, False, ((wire.Site(0, rows, watch=watch),),)))

    worker.rudder_pin(holding(1, watch=(0,)))
    worker.rudder_hold(-1, holding(2, 3))
    driver.admit("1-ab", 1, wire.decode(holding(3)))
    assert worker.rudder_usage()["rows"] == [3]
    worker.rudder_drop(-1)
    assert worker.rudder_usage()["rows"] == [2]
    worker.rudder_hold(-2, holding(4))
    for handle in (-1, -2):
        worker.rudder_drop(handle)
    driver.finish("1-ab")
    # Others are pinned in place of these.
    worker.rudder_pin(holding(2, 3, watch=(0, 1)))
    assert worker.rudder_usage() == {"slots": 0, "rows": [2], "requests": 1}
    assert worker.reader.pinned[0].tolist() == [
        driver.requests["held0"].lease.places[0, wire.Row(BUNDLE, i)] for i in (2, 3)
    ]


def test_bundles_are_loaded_with_the_model(caplog: pytest.LogCaptureFixture) -> None:
    """Before the KV cache takes the memory that is left, once each, and their bytes are logged."""
    bundle = PRETRAINED / "textbook-lm-layers.2"
    loaded = load_bundle("textbook-lm-layers.2", str(bundle), torch.device("cpu"))
    with pytest.raises(bundles.BundleError, match="changed since"):
        load_bundle("another", str(bundle), torch.device("cpu"))
    worker = SteeringWorker()
    worker.bundles = {loaded.manifest.name: loaded}
    worker.driver = make_driver(Layout(loaded.manifest.sites, rows=4, slots=2), toy_sae(Random(0)), width=192)
    worker.reader = Reader(worker.driver.banks)
    with caplog.at_level(logging.INFO, logger="rudder"):
        worker.serve_bundle(loaded.manifest.name, loaded)
    assert worker.rudder_bundles() == {loaded.manifest.name: loaded.sha256}
    assert worker.driver.saes[loaded.manifest.name] is loaded.sae
    assert worker.reader.dictionaries[0].screen
    size = sum(t.nbytes for t in (loaded.sae.encoder, loaded.sae.bias, loaded.sae.threshold, loaded.sae.decoder))
    assert f"{size + loaded.sae.decoder_bias.nbytes} bytes" in caplog.text
