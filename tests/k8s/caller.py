"""A caller and a kubelet for the pod of test_pod: `python caller.py GRPC_PORT HEALTH_PORT READINESS LIVENESS`.

Prints `streaming` in the middle of a stream, at which the pod gets SIGTERM, and in the end what it saw as JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rudder_client import Client

READY_S, TOKENS = 300.0, 400


def main() -> None:
    port, health_port, readiness, liveness = sys.argv[1:]
    with grpc.insecure_channel(f"127.0.0.1:{health_port}") as channel, Client(f"127.0.0.1:{port}") as client:
        stub: Any = health_pb2_grpc.HealthStub(channel)

        def serving(name: str) -> bool:
            request = health_pb2.HealthCheckRequest(service=name)
            return bool(stub.Check(request, timeout=20).status == health_pb2.HealthCheckResponse.SERVING)

        wait_ready(lambda: serving(readiness))
        answer = client.complete("Viruses infect", max_tokens=8, ignore_eos=True, timeout=120)
        tokens, drained = 0, None
        for chunk in client.generate("The cells of", max_tokens=TOKENS, ignore_eos=True, timeout=200):
            if not tokens:
                print("streaming", flush=True)
            tokens += len(chunk.token_ids)
            if drained is None and not serving(readiness):
                drained = {"tokens": tokens, "alive": serving(liveness)}
    print(json.dumps({"answer": answer.text, "tokens": tokens, "drained": drained}), flush=True)


def wait_ready(ready: Callable[[], bool]) -> None:
    """Probe until the pod is ready, as the startup probe does."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            if ready():
                return
        except grpc.RpcError:
            pass
        if time.monotonic() > deadline:
            sys.exit("the pod did not become ready")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
