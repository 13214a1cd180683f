"""The load of the engine benchmark, shared by the process that measures and those of the engines."""

from dataclasses import dataclass

from rudder.server.bench.shapes import SHAPES

WATCHED = 64
# The server process and a client process, against the engine in one process.
GRPC = "grpc"


@dataclass(frozen=True)
class Load:
    """The load and the size of the bank."""

    shape: str = "llama-100m"
    requests: int = 64
    prompt_tokens: int = 32
    new_tokens: int = 128
    # Starts of each pair of engines: speed varies by some percent with the pages and cores that a start gets.
    starts: int = 4
    pairs: int = 2
    rows: int = 256
    latents: int = 16384
    sites: int = 1
    programs: int = 64
    eager: bool = False
    cases: tuple[str, ...] = ()

    def all_cases(self) -> tuple[str, ...]:
        """Return the names of the cases to run."""
        size = f"{self.latents // 1024}k"
        watch = f"watch_{WATCHED}_features"
        names = ("idle", "one_program", f"{self.programs}_programs", watch, f"full_encode_{size}", GRPC)
        return tuple(name for name in names if not self.cases or name in self.cases)


@dataclass(frozen=True)
class Run:
    """One run of the load: tokens per second, and the median time to a request's first token."""

    tok_s: float
    first_ms: float


def sites_of(load: Load) -> tuple[str, ...]:
    """Return `load.sites` sites: first that of the bundle, in the middle of the model, then others."""
    layers = SHAPES[load.shape].layers
    middle = layers // 2
    others = [layer for layer in range(layers) if layer != middle]
    return tuple(f"layers.{layer}.resid_post" for layer in [middle, *others][: load.sites])
