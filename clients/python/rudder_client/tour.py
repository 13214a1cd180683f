"""A tour of Rudder: read it from top to bottom while it runs.

    python -m rudder_client.tour localhost:50051 http://localhost:9464/metrics

It needs a running server (`rudder serve`); `rudder demo` starts one for this tour.
"""

import sys
from urllib.request import ProxyHandler, build_opener

from rudder.v1 import catalogue_pb2
from rudder_client import Client, Program, Report

ADDRESS, METRICS = "localhost:50051", "http://localhost:9464/metrics"
SHOWN_METRICS = (
    "rudder_requests_total",
    "rudder_stream_tokens_total",
    "rudder_edits_applied_tokens_total",
    "rudder_bank",
    "rudder_feature",
)
SHOWN_EDITS = 5


def main(address: str = ADDRESS, metrics: str = METRICS) -> None:
    """Take the tour."""
    with Client(address) as client:
        client.wait_ready(timeout=300)
        model = client.model()
        (bundle,) = model.bundles
        print(f"{model.model} on vLLM {model.engine_version}, with {bundle.latents} SAE features at {bundle.site}")
        steer(client, bundle)
        unlearn(client)
        inspect(client)
        attest(client)
    print_metrics(metrics)


def title(text: str, look: str) -> None:
    """Print a heading, and what to look at."""
    bold = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold[0]}{text}{bold[1]}\n{look}\n", flush=True)


def steer(client: Client, bundle: catalogue_pb2.BundleInfo) -> None:
    """Search features by the words of their labels, and steer with them.

    `up` sets one feature to its maximum activation in the training corpus. `away` clamps it and others: where one is
    active, x is moved against it, here by half of the norm of x.
    """
    title(
        "1. One prompt: plain, steered up, steered away",
        "A tiny model writes poorly. Look at its topic: “up” moves it to stars, “away” against them.",
    )
    star = client.search("star astronomy", limit=1)[0]
    astronomy = client.search("astronomy", limit=30)
    print(f"up: feature {star.index}, “{star.label}”, active on {star.frequency:.2%} of tokens")
    print(f"away: it and {len(astronomy)} others, such as “{astronomy[0].label}”")
    up = Program().at(bundle.site).set(star.index, to=1.0, unit="max_activation", phase="generated")
    away = Program().at(bundle.site)
    for index in {feature.index for feature in [star, *astronomy]}:
        away = away.clamp(index, to=-0.5, unit="residual")
    prompt = "The planet has"
    for name, program in {"plain": None, "up": up, "away": away}.items():
        print(f"\n{name}: {prompt}", end="")
        for chunk in client.generate(prompt, steer=program, max_tokens=40, temperature=0.7, seed=3):
            print(chunk.text, end="", flush=True)
        print()


def unlearn(client: Client) -> None:
    """Use a program of the server by name: it makes the model forget microbiology, and little else."""
    title(
        "2. Unlearning: a microbiology prompt, then another one",
        "The program breaks off what the model knew of the first topic. The second pair is equal, letter by letter.",
    )
    for prompt in ("Bacteria that cause disease", "The American Revolution began"):
        for program in (None, "forget-microbiology"):
            completion = client.complete(prompt, steer=program, max_tokens=25, temperature=0.7, seed=7)
            print(f"{program or 'plain':>20}: {prompt}{completion.text!r}")


def inspect(client: Client) -> None:
    """Show what the model represents: the three strongest of all features, token by token."""
    title(
        "3. Inspect: the strongest features of each token",
        "Each token with features, their labels and activations. Some labels tell (“cells”), many are stop words.",
    )
    for token in client.inspect("Viruses infect cells.", report=Report(top_k=3)).tokens[1:]:
        names = ", ".join(f"{a.feature.index} “{a.feature.label}” {a.value:.1f}" for a in token.activations)
        print(f"{token.text!r:>12}  {names}")


def attest(client: Client) -> None:
    """Show what ran, counted inside the engine: an edit that changed no token is reported with 0 tokens."""
    title(
        "4. Attestation: what the engine counted",
        "Every answer says what ran. The engine counts it at each token: an edit that did nothing says “0 tokens”.",
    )
    completion = client.complete("Bacteria that cause disease", steer="forget-microbiology", max_tokens=25)
    attestation = completion.choices[0].attestation
    assert attestation is not None
    print(f"program {attestation.program_digest[:16]}, {attestation.tokens_seen} tokens went through the model")
    for edit in attestation.edits[:SHOWN_EDITS]:
        print(f"  {edit.site}: {edit.row}: {edit.operation}: touched {edit.tokens_touched} tokens")
    if len(attestation.edits) > SHOWN_EDITS:
        print(f"  and {len(attestation.edits) - SHOWN_EDITS} more edits")


def print_metrics(metrics: str) -> None:
    """Show the same over all requests, as Prometheus reads it."""
    title(
        "5. Metrics: totals over all requests",
        "The same for Prometheus. Row places and slots are those of the bank inside the model.",
    )
    # The server is on this machine or in this network: not behind the proxy of http_proxy.
    for line in build_opener(ProxyHandler({})).open(metrics).read().decode().splitlines():
        if line.startswith(SHOWN_METRICS):
            print(f"  {line}")


if __name__ == "__main__":
    main(*sys.argv[1:])
