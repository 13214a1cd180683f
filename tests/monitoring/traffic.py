"""Mixed traffic: callers of several roles, topics that rise and fall, refusals, cancelled calls, what policies stop."""

import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from rudder.server.identity import tokens
from rudder.server.identity.tokens import TokenFile
from rudder_client import Client, Program, RudderError

CALLERS = {
    "chat-app": ("generate",),
    "search": ("generate",),
    "research": ("generate", "steer", "raw", "observe"),
    # Makes no calls here: a test counts its own.
    "counted": ("generate", "steer"),
    "operator": ("operate", "administer", "observe"),
}
BUNDLE, SITE = "textbook-lm-layers.2", "layers.2.resid_post"
# Latents by what their labels say: microbiology and anatomy, government, planets, tissue, chemistry.
WATCHED = (1972, 2929, 1876, 1537, 713)
HAZARD = 1972
TOPICS = {
    "microbiology": ("Bacteria and viruses cause", "The bacterial cell wall is", "Antibiotics such as penicillin"),
    "government": ("The federal government and the courts", "Congress passed a law that"),
    "astronomy": ("The planets orbit the Sun", "A galaxy consists of"),
    "economics": ("The price of a good rises when", "Aggregate demand depends on"),
}
WAVE_S = 90.0
WORKERS = 4


def row(index: int) -> dict[str, object]:
    """A latent, as policies name it."""
    return {"feature": {"bundle": BUNDLE, "index": index}}


def policy(bundle_sha256: str, name: str, **fields: object) -> dict[str, object]:
    """A policy in JSON form, whose guard reads the hazard latent."""
    guard = {
        "name": "topic",
        "score": {"terms": [{"site": SITE, "row": row(HAZARD), "weight": 1}]},
        "moving_average": {"decay": 0.1},
        "level": 80,
        "min_tokens": 4,
        "action": "GUARD_ACTION_STOP",
        "hold_back": 4,
    }
    program = {"sites": [{"site": SITE, "edits": [{"row": row(HAZARD), "cap": 60.0}]}]}
    return {
        "name": name,
        "version": 1,
        "bundles": {BUNDLE: bundle_sha256},
        "program": program,
        "guards": [guard],
        **fields,
    }


def write_policies(folder: Path, bundle_sha256: str) -> None:
    """Write a policy that is enforced for the applications, and one in shadow mode."""
    folder.mkdir(exist_ok=True)
    documents = [
        policy(
            bundle_sha256,
            "no-microbiology",
            binds={"callers": ["chat-app", "search"]},
            refusal="This server does not answer questions about microbiology.",
            forbidden_fields=["sampling.logit_bias"],
        ),
        # Not for `research`: a guard that reads prompts keeps calls from the prefix cache.
        policy(bundle_sha256, "trial", binds={"callers": ["chat-app", "search"]}, mode="POLICY_MODE_SHADOW"),
    ]
    for document in documents:
        (folder / f"{document['name']}.yaml").write_text(yaml.safe_dump(document))


def write_tokens(file: Path) -> dict[str, str]:
    """Write a file with a token of each caller; return the tokens."""
    made = {caller: tokens.create(caller, roles) for caller, roles in CALLERS.items()}
    file.touch(mode=0o600)
    file.write_bytes(tokens.write(TokenFile(tuple(entry for _, entry in made.values()))))
    return {caller: token for caller, (token, _) in made.items()}


class Traffic:
    """Calls of all callers to a server at `address`, with their `tokens`.

    The share of calls on microbiology rises and falls, so that watched features do. `calls`: how many have ended.
    """

    def __init__(self, address: str, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.clients = {caller: Client(address, token=token, timeout=60) for caller, token in tokens.items()}
        self.stranger = Client(address, timeout=60)
        self.calls = 0
        self.started = time.monotonic()

    def topic(self, chance: random.Random) -> str:
        """Choose what a call is about."""
        hazard = 0.25 + 0.2 * math.sin((time.monotonic() - self.started) * 2 * math.pi / WAVE_S)
        return "microbiology" if chance.random() < hazard else chance.choice(list(TOPICS)[1:])

    def prompt(self, chance: random.Random) -> str:
        """Return a prompt."""
        return chance.choice(TOPICS[self.topic(chance)])

    def stream(self, chance: random.Random) -> None:
        """Stream an answer of an application."""
        caller = chance.choice(("chat-app", "chat-app", "search"))
        for _ in self.clients[caller].generate(self.prompt(chance), max_tokens=chance.randint(16, 64), temperature=1.0):
            pass

    def cancel(self, chance: random.Random) -> None:
        """Leave in the middle of an answer."""
        with self.clients["search"].generate(self.prompt(chance), max_tokens=64) as chunks:
            next(chunks)

    def steer(self, chance: random.Random) -> None:
        """Steer by a latent, and by a vector that no bank lets out."""
        client = self.clients["research"]
        program = Program().at(SITE).add(WATCHED[1], 20.0)
        client.complete(self.prompt(chance), max_tokens=24, steer=program, n=2)
        huge = [3e29, *[0.0] * (client.model().hidden_size - 1)]
        client.complete("The", max_tokens=2, steer=Program().at(SITE).add(vector=huge))

    def inspect(self, chance: random.Random) -> None:
        """Look at features."""
        self.clients["research"].inspect(self.prompt(chance))

    def look_around(self, _: random.Random) -> None:
        """Ask what is in force."""
        self.clients["operator"].policies()
        self.clients["operator"].model()

    def be_refused(self, chance: random.Random) -> None:
        """Make calls that end with refusals: no credentials, no role, a forbidden and an invalid field."""
        calls: list[Callable[[], object]] = [
            lambda: self.stranger.complete("The", max_tokens=1),
            lambda: self.clients["chat-app"].inspect("The"),
            lambda: self.clients["chat-app"].complete("The", max_tokens=1, logit_bias={5: 1.0}),
            lambda: self.clients["research"].complete("The", max_tokens=1, temperature=-1.0),
        ]
        chance.choice(calls)()

    def work(self, seed: int, ended: threading.Event) -> None:
        """Make calls one after another until `ended`. Every kind is made in each round."""
        chance = random.Random(seed)
        kinds = [*[self.stream] * 6, self.cancel, self.steer, self.inspect, self.look_around, *[self.be_refused] * 4]
        for kind in itertools.cycle(kinds):
            if ended.wait(chance.expovariate(20)):
                return
            with suppress(RudderError):
                kind(chance)
            self.calls += 1


@contextmanager
def running(address: str, tokens: dict[str, str]) -> Iterator[Traffic]:
    """Make traffic in threads until the end of the context."""
    traffic, ended = Traffic(address, tokens), threading.Event()
    threads = [threading.Thread(target=traffic.work, args=(seed, ended)) for seed in range(WORKERS)]
    for thread in threads:
        thread.start()
    try:
        yield traffic
    finally:
        ended.set()
        for thread in threads:
            thread.join()
