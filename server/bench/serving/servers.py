"""The servers of `rudder bench load` as child processes: stock vLLM's two, and Rudder without and with a policy."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import msgspec
import psutil

from rudder.server import config as configuration
from rudder.server.bench.load import Load, Subject
from rudder.server.process import free_port, server_command

READY_S, POLL_S, STOP_S = 900.0, 0.5, 30.0
# A HealthCheckResponse with the status SERVING.
SERVING = b"\x08\x01"
STOCK = {"vllm_openai": "vllm.entrypoints.openai.api_server", "vllm_grpc": "vllm.entrypoints.launchers.grpc_server"}


class Server(NamedTuple):
    """A running server."""

    name: str
    address: str
    process: psutil.Process

    def usage(self) -> tuple[float, float]:
        """Seconds of processor time so far, and peak resident memory in MiB, of all of its processes."""
        alive = [self.process, *self.process.children(recursive=True)]
        seconds = sum(sum(process.cpu_times()[:2]) for process in alive)
        return seconds, sum(peak_mib(process.pid) for process in alive)


def peak_mib(pid: int) -> float:
    """Return the peak resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


@contextmanager
def serving(name: str, subject: Subject, load: Load, peers: Path | None) -> Iterator[Server]:
    """Start a server, wait until it is ready, and stop it at the end. Raises RuntimeError if it does not start."""
    port = free_port()
    log = subject.folder / f"{name}.log"
    command = stock_command(name, subject, load, port) if name in STOCK else rudder_command(name, subject, load, port)
    # Rudder does not start where vLLM would load a plugin, and the servicer brings one.
    paths = [str(peers)] if peers and name == "vllm_grpc" else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        wait_ready(name, port, process, log)
        yield Server(name, f"127.0.0.1:{port}", psutil.Process(process.pid))
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a server and what it started."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stock_command(name: str, subject: Subject, load: Load, port: int) -> list[str]:
    """Return the command of one of vLLM's own servers, with the arguments that Rudder gives its engine."""
    from rudder.server.bench import sides
    from rudder.server.engine.adapter import engine_args
    from rudder.server.program.layout import Layout

    args = engine_args(sides.config_of(subject, load), Layout(subject.sites))
    flags = {
        "model": args.model, "dtype": args.dtype, "load-format": args.load_format, "seed": args.seed,
        "max-model-len": args.max_model_len, "max-num-seqs": args.max_num_seqs,
        "max-num-batched-tokens": args.max_num_batched_tokens, "kv-cache-memory-bytes": args.kv_cache_memory_bytes,
        "host": "127.0.0.1", "port": port,
    }  # fmt: skip
    if args.distributed_executor_backend:
        # Stock vLLM would start a separate worker process here, which is slower on a CPU.
        flags["distributed-executor-backend"] = args.distributed_executor_backend
    named = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    switches = ["--enforce-eager"] if args.enforce_eager else []
    switches += ["--disable-uvicorn-access-log"] if name == "vllm_openai" else []
    return [sys.executable, "-m", STOCK[name], *named, *switches]


def rudder_command(name: str, subject: Subject, load: Load, port: int) -> list[str]:
    """Return the command of `rudder serve`, with a folder of one policy where `name` asks for it."""
    from rudder.server.bench import sides

    config = msgspec.structs.replace(
        sides.config_of(subject, load), listen=configuration.Listen(port=port, metrics_port=free_port())
    )
    if name == "rudder_policy":
        folder = subject.folder / "policies"
        write_policy(folder, subject)
        policies = configuration.Policies(folder=str(folder), allow_uncertified=True)
        config = msgspec.structs.replace(config, policies=policies)
    settings = subject.folder / f"{name}.yaml"
    settings.write_text(configuration.show(config))
    return server_command("--config", str(settings))


def write_policy(folder: Path, subject: Subject) -> None:
    """Write the policy of the engine benchmark: a program and three guards, the strictest with a hold-back of 8."""
    from google.protobuf import json_format

    from rudder.server.bench import sides

    folder.mkdir(exist_ok=True)
    # YAML is a superset of JSON.
    (folder / "bench.yaml").write_text(json_format.MessageToJson(sides.policy_of(subject)))


def wait_ready(name: str, port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a server answers. Raises RuntimeError, with the end of its log, if it stops or takes too long."""
    end = time.monotonic() + READY_S
    while not answers(name, port):
        if process.poll() is not None or time.monotonic() > end:
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the server {name} did not start:\n{tail}")
        time.sleep(POLL_S)


def answers(name: str, port: int) -> bool:
    """Return whether a server is ready for requests."""
    if name == "vllm_openai":
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False
    return is_serving(f"127.0.0.1:{port}")


def is_serving(address: str) -> bool:
    """Return whether the standard health service of a gRPC server says that it serves."""
    with grpc.insecure_channel(address) as channel:
        check: Callable[..., bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            return bool(check(b"", timeout=5) == SERVING)
        except grpc.RpcError:
            return False
