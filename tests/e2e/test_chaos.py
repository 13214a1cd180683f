"""Whatever fails, each client gets one status in its deadline, and the server holds nothing afterwards."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rudder.server.failpoints import VARIABLE
from rudder_client import AsyncClient, Client, RudderError
from tests.e2e.conftest import FLAGS, Running, running
from tests.e2e.test_process import write_policy
from tests.fuzz.wire import held_when_idle, probe
from tests.soak.soak import Result, children_of, soak
from tests.soak.traffic import MAX_MESSAGE_BYTES, PROMPT, client_after_client, unexpected

pytestmark = [pytest.mark.e2e, pytest.mark.long]
# Seeds that failed once are added here, and so run for ever.
SEEDS = [1, 2, 3, 4]
FAULTS = {
    "call": ("error",), "decode": ("error",), "admit.before": ("error", "delay"), "admit.after": ("error", "delay"),
    "first_token": ("error", "delay"), "verdict": ("error", "delay"), "stream.write": ("error", "delay"),
    "abort": ("delay",), "audit.write": ("enospc",), "policy.reload": ("enospc",),
}  # fmt: skip
# What a client may be told besides, where a fault is planted.
PLANTED = {"INTERNAL", "UNAVAILABLE"}
# For a machine that does much else.
SLACK_S = 20.0
# Streams of a thousand tokens that vLLM runs at once: one that it queues would have no lease to find.
FITTING = 5
SOAK_S, LEAKING_S = 120.0, 40.0
BUILD = Path(__file__).parents[2] / "build"


def engine_of(server: Running) -> int:
    """Return the engine process of a server."""
    (engine,) = (
        child for child in children_of(server.process.pid) if "VLLM" in Path(f"/proc/{child}/cmdline").read_text()
    )
    return engine


def exists(process: int) -> bool:
    """Return whether a process is there."""
    return Path(f"/proc/{process}/status").exists()


def log_lines(server: Running, text: str) -> int:
    """Return how many lines of the log have a text."""
    return sum(text in line for line in server.log.read_text().splitlines())


async def end_of(client: AsyncClient, timeout: float | None, tokens: int = 1000) -> tuple[str, str, float]:
    """Read a stream; return code and reason of its end, and the seconds that it took."""
    started, positions = time.monotonic(), 0
    try:
        async for chunk in client.generate(PROMPT, max_tokens=tokens, ignore_eos=True, timeout=timeout):
            positions += len(chunk.token_ids)
    except RudderError as error:
        return error.code, error.reason, time.monotonic() - started
    assert positions == tokens
    return "OK", "", time.monotonic() - started


async def ends_after(
    client: AsyncClient, streams: int, timeout: float | None, fault: Any
) -> list[tuple[str, str, float]]:
    """Begin streams; carry out `fault` once they run; return their ends."""
    tasks = [asyncio.create_task(end_of(client, timeout)) for _ in range(streams)]
    await asyncio.sleep(1.0)
    fault()
    return await asyncio.wait_for(asyncio.gather(*tasks), 60 + SLACK_S)


async def test_killed_engine_gives_every_client_a_status_and_ends_the_server(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        async with AsyncClient(server.address) as client:
            ends = await ends_after(client, 64, 60.0, lambda: os.kill(engine_of(server), signal.SIGKILL))
        assert {end[:2] for end in ends} <= {
            ("UNAVAILABLE", "ENGINE_DEAD"),
            ("UNAVAILABLE", "VERDICT_LOST"),
            ("OK", ""),
        }
        assert any(code == "UNAVAILABLE" for code, *_ in ends)
        assert max(seconds for *_, seconds in ends) < 60
        assert server.process.wait(30 + SLACK_S) == 1


async def test_stopped_engine_is_noticed_recovers_and_is_given_up(tmp_path: Path) -> None:
    with running(tmp_path, **{"engine.stall_s": "5", "engine.stall_kill_s": "35"}) as server:
        engine = engine_of(server)
        async with AsyncClient(server.address) as client:
            before = await probe(client)
            ends = await ends_after(client, 16, 10.0, lambda: os.kill(engine, signal.SIGSTOP))
            assert {code for code, *_ in ends} <= {"DEADLINE_EXCEEDED", "OK"}
            assert max(seconds for *_, seconds in ends) < 10 + SLACK_S
            server.log_line("the engine makes no progress", 10)
            with pytest.raises(RudderError):
                await client.wait_ready(timeout=1)
            with pytest.raises(RudderError) as caught:
                await client.complete(PROMPT, max_tokens=1, timeout=5)
            assert (caught.value.code, caught.value.reason) == ("UNAVAILABLE", "ENGINE_STALLED")
            os.kill(engine, signal.SIGCONT)
            await client.wait_ready(timeout=SLACK_S)
            assert not any((await held_when_idle(client)).values())
            assert await probe(client) == before
            counts = [log_lines(server, f"the engine makes {what}") for what in ("no progress", "progress again")]
            # Once for each stall, of which a busy machine may have had others.
            assert counts[0] == counts[1] >= 1
            ends = await ends_after(client, 16, None, lambda: os.kill(engine, signal.SIGSTOP))
            assert {end[:2] for end in ends} <= {("UNAVAILABLE", "ENGINE_DEAD"), ("OK", "")}
        assert server.process.wait(30 + SLACK_S) == 1
        assert not exists(engine)


async def test_clock_that_jumps_changes_no_deadline_and_ends_no_stream(tmp_path: Path) -> None:
    with running(tmp_path, module="tests.e2e.jumping_server") as server:
        async with AsyncClient(server.address) as client:
            before = await probe(client)
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                tasks = [asyncio.create_task(end_of(client, 60.0, 200)) for _ in range(8)]
                late = [asyncio.create_task(end_of(client, 0.5, 1000)) for _ in range(8)]
                await asyncio.sleep(0.2)
                server.process.send_signal(number)
                assert {code for code, *_ in await asyncio.gather(*tasks)} == {"OK"}
                ends = await asyncio.gather(*late)
                assert {code for code, *_ in ends} == {"DEADLINE_EXCEEDED"}
                assert max(seconds for *_, seconds in ends) < 0.5 + SLACK_S
            assert not any((await held_when_idle(client)).values())
            assert await probe(client) == before


class Faulty:
    """A server whose faults are in a file."""

    def __init__(self, server: Running, file: Path) -> None:
        self.server, self.file = server, file

    def plant(self, **faults: dict[str, Any]) -> None:
        """Set the faults; a name has `__` for its dot. They take effect at once."""
        content = json.dumps({name.replace("__", "."): fault for name, fault in faults.items()})
        # Read at every point: never half of it.
        self.file.with_suffix(".new").write_text(content)
        self.file.with_suffix(".new").replace(self.file)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """A server with a policy that holds answers back, an audit log that fails closed, and a file of faults."""
    folder = tmp_path_factory.mktemp("chaos")
    (folder / "faults.json").write_text("{}")
    write_policy(folder / "policies")
    subprocess.run([sys.executable, "-m", "rudder.server", "audit", "key", str(folder / "key")], check=True)
    flags = {
        "policies.folder": str(folder / "policies"), "policies.reload_s": "1", "audit.folder": str(folder / "audit"),
        "audit.key_file": str(folder / "key"), "allow_unsafe": "failpoints", "limits.write_timeout_s": "30",
        "limits.max_message_bytes": str(MAX_MESSAGE_BYTES), "engine.kv_cache_memory_bytes": str(64 << 20),
    }  # fmt: skip
    with ExitStack() as stack:
        # Of this server alone: another one would not start with it.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, str(folder / "faults.json"))
            server = stack.enter_context(running(folder, **flags))
        yield Faulty(server, folder / "faults.json")


async def recovered(client: AsyncClient) -> None:
    """Wait until calls are served again: the audit log tries its disk once a second."""
    for _ in range(100):
        if (await end_of(client, 30.0, 8))[0] == "OK":
            return
        await asyncio.sleep(0.1)
    raise AssertionError("calls are not served again")


def drawn_faults(seed: int) -> dict[str, dict[str, Any]]:
    """Return one to three faults."""
    drawing = random.Random(seed)
    points = drawing.sample(sorted(FAULTS), drawing.randint(1, 3))
    return {
        point: {"action": drawing.choice(FAULTS[point]), "seconds": drawing.choice((0.001, 0.05, 0.3)), "share": 0.2}
        for point in points
    }


@pytest.mark.parametrize("seed", SEEDS)
async def test_random_faults_under_random_traffic(faulty: Faulty, seed: int) -> None:
    random.seed(seed)
    faults = drawn_faults(seed)
    print(f"seed {seed}: {faults}")
    async with AsyncClient(faulty.server.address, timeout=60) as client:
        before = await probe(client)
        faulty.plant(**faults)
        seen: Counter[tuple[str, str]] = Counter()
        until = time.monotonic() + 3
        await asyncio.gather(*(client_after_client(faulty.server.address, until, seen) for _ in range(24)))
        faulty.plant()
        surprising = {what for what in unexpected(seen) if what.split()[1] not in PLANTED}
        assert not surprising
        assert sum(seen.values()) > 20
        assert not any((await held_when_idle(client)).values())
        await recovered(client)
        assert await probe(client) == before
        await client.wait_ready(timeout=5)


async def test_full_disk_refuses_bound_calls_until_there_is_room(faulty: Faulty) -> None:
    async with AsyncClient(faulty.server.address, timeout=30) as client:
        before = await probe(client)
        faulty.plant(audit__write={"action": "enospc"})
        ends = await asyncio.gather(*(end_of(client, 30.0, 8) for _ in range(16)))
        assert {end[:2] for end in ends} == {("UNAVAILABLE", "AUDIT_FAILED")}
        faulty.plant()
        await recovered(client)
        assert await probe(client) == before
        assert not any((await held_when_idle(client)).values())


async def test_swallowed_abort_is_found_by_the_ledger(faulty: Faulty) -> None:
    """The positive control of the ledger: without it, these tests would prove nothing."""
    async with AsyncClient(faulty.server.address, timeout=60) as client:
        for planted in (False, True):
            faulty.plant(**({"abort": {"action": "skip"}} if planted else {}))
            streams = [client.generate(PROMPT, max_tokens=1000, ignore_eos=True) for _ in range(FITTING)]
            for stream in streams:
                async with stream:
                    await anext(stream)
            held = await held_when_idle(client, 1.0 if planted else SLACK_S)
            assert bool(held["worker_leases"]) is planted
        faulty.plant()
        assert not any((await held_when_idle(client, 60.0)).values())


async def test_soak_of_random_clients_grows_nothing_and_leaves_nothing(faulty: Faulty) -> None:
    result = await soak(faulty.server.address, faulty.server.process.pid, SOAK_S, 48)
    report("soak", result)
    assert result.problems == []


async def test_soak_of_random_clients_finds_a_planted_leak(faulty: Faulty) -> None:
    faulty.plant(call={"action": "leak", "bytes": 64 << 10})
    result = await soak(faulty.server.address, faulty.server.process.pid, LEAKING_S, 48)
    faulty.plant()
    report("soak-leak", result)
    assert any(problem.startswith("server grew by") for problem in result.problems)


def report(name: str, result: Result) -> None:
    """Leave a result behind."""
    BUILD.mkdir(exist_ok=True)
    (BUILD / f"{name}.json").write_text(json.dumps(msgspec.to_builtins(result), indent=1) + "\n")


def test_engine_that_is_never_fully_up_ends_the_start(tmp_path: Path) -> None:
    flags = {**FLAGS, "engine.start_timeout_s": "2", "listen.port": "0", "listen.metrics_port": "0"}
    command = [sys.executable, "-m", "rudder.server", "serve", *(f"--{name}={value}" for name, value in flags.items())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert "did not start within engine.start_timeout_s, 2 s" in result.stderr


def test_failpoints_are_refused_outside_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "faults.json"))
    command = [sys.executable, "-m", "rudder.server", "serve", "--listen.port=0", "--listen.metrics_port=0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "allow_unsafe" in result.stderr


def test_ledger_command_prints_the_full_ledger(faulty: Faulty) -> None:
    address = faulty.server.address
    with Client(address) as client:
        client.complete(PROMPT, max_tokens=2)
    command = [sys.executable, "-m", "rudder.server", "debug", "ledger", "--wait", "20", "--address", address]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout
    assert "worker_leases" in result.stdout
    assert "resident_bytes" in result.stdout
