"""The load of the engine benchmark, shared by the process that measures and those of the engines."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rudder.server.bench.shapes import SHAPES

WATCHED = 64
# A request may hold more of the KV cache than it has tokens, up to a block.
BLOCK_TOKENS = 32
# The server process and a client process, against the engine in one process.
GRPC = "grpc"
# A policy with a program and three guards, of which the one that stops holds eight tokens back.
POLICY = "policy_with_guards"


class Load(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The load and the size of the bank."""

    model: Annotated[
        Literal["random", "smollm2-135m-instruct"],
        Meta(description="random: of `shape`, `latents`, `k` and `sites`; or a model with its shipped bundles"),
    ] = "random"
    shape: Annotated[
        Literal["llama-100m", "llama-8b", "llama-8b-4-layers", "tiny"], Meta(description="shape of the random model")
    ] = "llama-100m"
    requests: Annotated[int, Meta(ge=1, description="concurrent requests")] = 64
    prompt_tokens: Annotated[int, Meta(ge=1, description="tokens of a prompt")] = 32
    new_tokens: Annotated[int, Meta(ge=1, description="tokens to generate per request")] = 128
    # Starts of each pair of engines: speed varies by some percent with the pages and cores that a start gets.
    starts: Annotated[int, Meta(ge=1, description="number of times that each pair of engines is started")] = 4
    pairs: Annotated[int, Meta(ge=1, description="measured pairs of runs per case and start")] = 2
    warm_up: Annotated[
        Literal["case", "start"],
        Meta(description="what begins with a pair that is not counted: each case, or each start"),
    ] = "case"
    rows: Annotated[int, Meta(ge=1, description="row places in the bank of each site")] = 256
    latents: Annotated[int, Meta(ge=1, description="latents of the SAE")] = 16384
    k: Annotated[
        int,
        Meta(ge=0, description="active latents of a TopK SAE, encoded whole in each step; 0: an SAE with thresholds"),
    ] = 0
    sites: Annotated[int, Meta(ge=1, description="hooked sites")] = 1
    programs: Annotated[int, Meta(ge=1, description="distinct programs of the case with several")] = 64
    eager: Annotated[bool, Meta(description="do not compile the model")] = False
    cases: Annotated[tuple[str, ...], Meta(description="cases to run, separated by commas; empty: all")] = ()

    def all_cases(self) -> tuple[str, ...]:
        """Return the names of the cases to run."""
        encode = f"full_encode_{self.latents // 1024}k" if self.model == "random" else "full_encode"
        watch = f"watch_{WATCHED}_features"
        names = ("idle", "one_program", f"{self.programs}_programs", watch, encode, POLICY, GRPC)
        return tuple(name for name in names if not self.cases or name in self.cases)


@dataclass(frozen=True)
class Run:
    """One run of the load: tokens per second, and a request's median time to its first token and for each later one."""

    tok_s: float
    first_ms: float
    tpot_ms: float = 0.0


@dataclass(frozen=True)
class Subject:
    """What is measured: a model and its bundles. `sites`: those of the banks, one of each bundle first. `folder`: for
    files of the run. `kv_token_bytes`: keys and values of a token.
    """

    folder: Path
    model: Path
    bundles: tuple[Path, ...]
    sites: tuple[str, ...]
    width: int
    kv_token_bytes: int
    random: bool = True

    @property
    def sae_sites(self) -> tuple[str, ...]:
        """The sites that have an SAE."""
        return self.sites[: len(self.bundles)]


def kv_cache_bytes(load: Load, subject: Subject) -> int:
    """Return the size of a KV cache in which all requests have room at once: no run depends on preemption."""
    tokens = load.requests * (load.prompt_tokens + load.new_tokens + BLOCK_TOKENS)
    return max((2 << 30) if subject.random else (1 << 29), tokens * subject.kv_token_bytes)


def sites_of(load: Load) -> tuple[str, ...]:
    """Return `load.sites` sites: first that of the bundle, in the middle of the model, then others."""
    layers = SHAPES[load.shape].layers
    middle = layers // 2
    others = [layer for layer in range(layers) if layer != middle]
    return tuple(f"layers.{layer}.resid_post" for layer in [middle, *others][: load.sites])


def shipped_subject(folder: Path, model: Path, bundles: tuple[Path, ...]) -> Subject:
    """Describe a model whose bundles were trained, by their manifests and its configuration."""
    config = json.loads((model / "config.json").read_bytes())
    sites = tuple(str(json.loads((bundle / "manifest.json").read_bytes())["sites"][0]) for bundle in bundles)
    # Up to four bytes a value, as in float32.
    token_bytes = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return Subject(folder, model, bundles, sites, int(config["hidden_size"]), token_bytes, random=False)
