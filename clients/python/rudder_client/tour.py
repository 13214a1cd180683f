"""A tour of Rudder: read it from top to bottom while it runs.

    python clients/python/examples/tour.py localhost:50051 http://localhost:9464/metrics

Needs a running server (`make serve`); `make demo` starts one just for this tour.
"""

import sys
from urllib.request import urlopen

from rudder_client import Client, Program, Report

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"
METRICS = sys.argv[2] if len(sys.argv) > 2 else "http://localhost:9464/metrics"


def title(text: str) -> None:
    """A heading."""
    print(f"\n\033[1m{text}\033[0m")


with Client(ADDRESS) as client:
    client.wait_ready(timeout=300)
    model = client.model()
    (bundle,) = model.bundles
    print(f"{model.model} on vLLM {model.engine_version}, with {bundle.latents} SAE features at {bundle.site}")

    # 1. Features, found by the words of their labels. One is given as much activation as it ever had in the training
    #    corpus. The others are clamped: where one is active, x is moved against it, here by half of its own length.
    title("1. One prompt: plain, steered up, steered away")
    star = client.search("star astronomy", limit=1)[0]
    astronomy = client.search("astronomy", limit=30)
    print(f"up: feature {star.index}, “{star.label}”, active on {star.frequency:.2%} of tokens")
    print(f"away: it and {len(astronomy)} others, such as “{astronomy[0].label}”")
    up = Program().at(bundle.site).set(star.index, to=1.0, unit="max_activation", phase="generated")
    away = Program().at(bundle.site)
    for feature in {found.index for found in [star, *astronomy]}:
        away = away.clamp(feature, to=-0.5, unit="residual")
    prompt = "The planet has"
    for name, program in {"plain": None, "up": up, "away": away}.items():
        print(f"\n{name}: {prompt}", end="")
        for chunk in client.generate(prompt, steer=program, max_tokens=40, temperature=0.7, seed=3):
            print(chunk.text, end="", flush=True)
        print()

    # 2. A program of the server's own, by name: it was chosen to make the model forget microbiology and little else.
    title("2. Unlearning: a microbiology prompt, then another one")
    for prompt in ("Bacteria that cause disease", "The American Revolution began"):
        for steer in (None, "forget-microbiology"):
            answer = client.complete(prompt, steer=steer, max_tokens=25, temperature=0.7, seed=7)
            print(f"{steer or 'plain':>20}: {prompt}{answer.text!r}")

    # 3. What the model represents, token by token: the three strongest of all features.
    title("3. Inspect: the strongest features of each token")
    for token in client.inspect("Viruses infect cells.", report=Report(top_k=3)).tokens[1:]:
        names = ", ".join(f"{a.feature.index} “{a.feature.label}” {a.value:.1f}" for a in token.activations)
        print(f"{token.text!r:>12}  {names}")

    # 4. What ran, counted inside the engine: a program that touches nothing is told so, never assumed to have worked.
    title("4. Attestation: what the server says it did")
    answer = client.complete("Bacteria that cause disease", steer="forget-microbiology", max_tokens=25)
    attestation = answer.choices[0].attestation
    assert attestation is not None
    print(f"program {attestation.program_digest[:16]}, {attestation.tokens_seen} tokens went through the model")
    for edit in attestation.edits[:5]:
        print(f"  {edit.site}: {edit.row}: {edit.operation}: touched {edit.tokens_touched} tokens")
    if len(attestation.edits) > 5:
        print(f"  and {len(attestation.edits) - 5} more edits")

# 5. The same in Prometheus, over all requests.
title("5. Metrics: what the server counted")
wanted = (
    "rudder_requests_total",
    "rudder_stream_tokens_total",
    "rudder_edits_applied_tokens_total",
    "rudder_bank",
    "rudder_feature",
)
for line in urlopen(METRICS).read().decode().splitlines():
    if line.startswith(wanted):
        print(f"  {line}")
