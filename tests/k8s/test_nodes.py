"""A model over two machines, here two processes: the follower starts with the same bundle and ends with its leader."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rudder.server.process import free_port
from rudder_client import Client, Program
from tests.e2e.conftest import FLAGS, running

pytestmark = [pytest.mark.long, pytest.mark.e2e]
SITE = "layers.2.resid_post"
STARTED_S, ENDED_S = 300, 60


def flags(port: int) -> dict[str, str]:
    return {"engine.tensor_parallel_size": "2", "engine.nodes": "2", "engine.leader_port": str(port)}


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of one machine, on a core each."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@contextmanager
def following(folder: Path, port: int, **other: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a follower with these flags, in a session of its own; kill what is left of it."""
    values = {**FLAGS, **flags(port), "engine.node_rank": "1", "listen.health_port": str(free_port()), **other}
    values |= {"listen.port": str(free_port()), "listen.metrics_port": str(free_port())}
    command = [sys.executable, "-m", "rudder.server", "serve", *(f"--{name}={value}" for name, value in values.items())]
    with (folder / "follower.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()


def test_two_machines_serve_one_model_and_end_together(tmp_path: Path) -> None:
    port = free_port()
    program = Program().at(SITE).set(feature=100, to=0.4, unit="residual")
    with following(tmp_path, port) as follower, running(tmp_path, **flags(port)) as leader:
        with Client(leader.address) as client:
            choice = client.complete("The cells", steer=program, max_tokens=8, ignore_eos=True, timeout=120).choices[0]
        assert choice.attestation is not None
        assert choice.attestation.edits[0].tokens_touched > 8
        # Both get SIGTERM at once, as the pods of a group do: the follower stays until the leader has ended.
        stream_client = Client(leader.address)
        stream = stream_client.generate("The cells", max_tokens=200, ignore_eos=True, timeout=200)
        first = len(next(stream).token_ids)
        follower.send_signal(signal.SIGTERM)
        leader.process.send_signal(signal.SIGTERM)
        assert first + sum(len(chunk.token_ids) for chunk in stream) == 200
        stream_client.close()
        assert leader.process.wait(ENDED_S) == 0
        assert follower.wait(ENDED_S) == 0


def test_a_follower_without_the_bundle_does_not_start(tmp_path: Path) -> None:
    with following(tmp_path, free_port(), **{"engine.bundles": "[nowhere]"}) as follower:
        assert follower.wait(STARTED_S) == 2
    assert "engine.bundles: 'nowhere' is not a folder" in (tmp_path / "follower.log").read_text()


def test_a_follower_with_another_bank_ends_the_start(tmp_path: Path) -> None:
    """What differs would not show: each rank would edit by its own rows."""
    port = free_port()
    with following(tmp_path, port, **{"engine.slots": "8"}):
        values = {**FLAGS, **flags(port), "listen.port": str(free_port()), "listen.metrics_port": str(free_port())}
        command = [sys.executable, "-m", "rudder.server", "serve", *(f"--{k}={v}" for k, v in values.items())]
        leader = subprocess.run(command, capture_output=True, text=True, timeout=STARTED_S, check=False)
    assert leader.returncode == 2
    assert "engine.nodes: a machine has another configuration of the bank" in leader.stderr
