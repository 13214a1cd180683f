"""A tour of Rudder: read it from top to bottom while it runs.

    python -m rudder_client.tour localhost:50051 http://localhost:9464/metrics

It needs a running server of a model of tour_words.py with its programs (`rudder serve --model auto`); `rudder demo`
starts one for this tour, and adds a step that compares with plain vLLM.
"""

import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.request import ProxyHandler, build_opener

from rudder.v1 import catalogue_pb2
from rudder_client import Client, Feature, Report
from rudder_client.results import Activation
from rudder_client.tour_words import WORDS, Words

ADDRESS, METRICS = "localhost:50051", "http://localhost:9464/metrics"
WIDTH, INDENT = 110, 24
TOPIC, STRENGTHS = "astronomy", ("-light", "", "-strong")
UNLEARNING = "forget-microbiology"
LEVELS = " ▁▂▃▄▅▆▇█"
SHOWN_METRICS = (
    "rudder_requests_total",
    "rudder_stream_tokens_total",
    "rudder_edits_applied_tokens_total",
    "rudder_bank",
)
SHOWN_EDITS, SHOWN_FEATURES = 5, 3


def main(address: str = ADDRESS, metrics: str = METRICS) -> None:
    """Take the tour."""
    with Client(address) as client:
        client.wait_ready(timeout=300)
        model = client.model()
        if model.model not in WORDS:
            sys.exit(f"the tour has no prompts for {model.model}, only for {', '.join(WORDS)}")
        words = WORDS[model.model]
        saes = ", ".join(f"{bundle.latents} SAE features at {bundle.site}" for bundle in model.bundles)
        print(f"{model.model} on vLLM {model.engine_version}, with {saes}")
        steer(client, words)
        watch(client, words, model.bundles[-1])
        unlearn(client, words)
        attest(client, words)
    print_metrics(metrics)


def title(text: str, look: str) -> None:
    """Print a heading, and what to look at."""
    bold = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold[0]}{text}{bold[1]}\n{textwrap.fill(look, WIDTH)}\n", flush=True)


def show(name: str, text: str) -> None:
    """Print a text behind its name, in lines of the same indentation."""
    indent = " " * (INDENT + 2)
    print(textwrap.fill(" ".join(text.split()), WIDTH, initial_indent=f"{name:>{INDENT}}: ", subsequent_indent=indent))
    sys.stdout.flush()


def answers(client: Client, words: Words, asked: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return what the model says to prompts, each with a program of the server or without one.

    They are asked at once: requests with different programs, and without one, run in one batch.
    """

    def answer(prompt: str, program: str | None) -> str:
        return client.complete(words.prompt(prompt), steer=program, **words.sampling).choices[0].text

    with ThreadPoolExecutor(len(asked)) as threads:
        return list(threads.map(answer, *zip(*asked, strict=True)))


def steer(client: Client, words: Words) -> None:
    """Ask two questions, plain and with programs that add to the features of a topic, or subtract from them."""
    title(
        "1. Steering: a topic turned up, and down",
        f"Look for {TOPIC} in the answers. Up, it comes into one that has nothing to do with it; down, it goes from one"
        f" that is about it. {words.remark}",
    )
    for direction, prompt in (("more", words.up), ("less", words.down)):
        show("prompt", prompt)
        programs = (None, *(f"{direction}-{TOPIC}{strength}" for strength in STRENGTHS))
        texts = answers(client, words, [(prompt, program) for program in programs])
        for program, text in zip(programs, texts, strict=True):
            show(program or "plain", text)
        print()


def watch(client: Client, words: Words, bundle: catalogue_pb2.BundleInfo) -> None:
    """Show the strongest features of a text, token by token, and one feature while the model answers."""
    title(
        "2. Watching: what the model represents",
        "Each token with its strongest features: number, label, activation. Labels are words in whose company the"
        " feature was active.",
    )
    # The first token's activations say nothing: its residual is that of an attention sink.
    for token in client.inspect(words.inspected, report=Report(top_k=32, sites=[bundle.site])).tokens[1:]:
        names = [f"{a.feature.index} “{a.feature.label}” {a.value:.1f}" for a in labelled(token.activations)]
        if names:
            print(f"{token.text!r:>{INDENT}}  {', '.join(names[:SHOWN_FEATURES])}")
    matches = (client.search(word, bundle=bundle.name, limit=1) for word in words.rising)
    feature = next(found[0] for found in matches if found)
    print(f"\nFeature {feature.index}, “{feature.label}”, while the model answers “{words.down}”:\n")
    rise(client, words, Feature(feature.index, feature.bundle), feature.site)


def labelled(activations: Sequence[Activation]) -> list[Activation]:
    """Return the activations of features that have a label."""
    return [a for a in activations if a.feature.label and a.feature.label != "no label"]


def rise(client: Client, words: Words, feature: Feature, site: str) -> None:
    """Stream an answer, and print the feature's activation as a bar below each piece of text."""
    report = Report(features={site: [feature]})
    pieces = [
        (chunk.text.replace("\n", " "), max((a.value for a in chunk.activations), default=0.0))
        for chunk in client.generate(words.prompt(words.down), report=report, stream_interval=1, **words.sampling)
    ]
    highest = max((value for _, value in pieces), default=0.0) or 1.0
    text = "".join(piece for piece, _ in pieces)
    bars = "".join(LEVELS[round(value / highest * (len(LEVELS) - 1))] * len(piece) for piece, value in pieces)
    for start in range(0, len(text), WIDTH):
        print(f"  {text[start : start + WIDTH]}\n  {bars[start : start + WIDTH]}")


def unlearn(client: Client, words: Words) -> None:
    """Use a program of the server by name: it makes the model forget microbiology, and little else."""
    title(
        "3. Unlearning: three prompts on microbiology, and three others",
        "With the program the model has no answer to the first three any more. It answers the others as before: where"
        " not one letter differs, the line says so.",
    )
    prompts = (*words.forgotten, *words.kept)
    texts = answers(client, words, [(prompt, program) for program in (None, UNLEARNING) for prompt in prompts])
    for prompt, plain, forgetting in zip(prompts, texts, texts[len(prompts) :], strict=False):
        show("prompt", prompt)
        show("plain", plain)
        show(UNLEARNING, "the same, letter by letter" if plain == forgetting else forgetting)


def attest(client: Client, words: Words) -> None:
    """Show what ran, counted inside the engine: an edit that changed no token is reported with 0 tokens."""
    title(
        "4. Attestation: what the engine counted",
        "Every answer says what ran. The engine counts it at each token: an edit that did nothing says “0 tokens”.",
    )
    completion = client.complete(words.prompt(words.forgotten[0]), steer=UNLEARNING, **words.sampling)
    attestation = completion.choices[0].attestation
    assert attestation is not None
    print(f"program {attestation.program_digest[:16]}, {attestation.tokens_seen} tokens went through the model")
    for gate in attestation.gates:
        print(f"  {gate.site}: the gate was open at {gate.open_tokens} tokens")
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
