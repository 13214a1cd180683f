"""The bank's Triton kernels equal its PyTorch operations, in Triton's interpreter, and compile for a GPU."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from rudder.sae_models.operations import ENTRY, TOKEN
from rudder.sae_models.sae import SAE, Normalisation, TopK
from rudder.server.engine.worker import kernels
from rudder.server.engine.worker.driver import Driver
from rudder.server.engine.worker.worker import build_banks
from rudder.server.program import wire
from rudder.server.program.layout import Layout
from tests.unit.reference import BUNDLE, LATENTS, WIDTH, Floats, grid, random_request, run_step, toy_sae
from tests.unit.server.engine.worker.test_bounds import LAYOUT as ALL_POINTS
from tests.unit.server.engine.worker.test_bounds import program, steps, stream

ROOT = Path(__file__).parents[2]
SITES = ("layers.0.resid_post", "layers.1.mlp_out")
# No size is a power of two or a multiple of a tile.
LAYOUT = Layout(SITES, rows=45, slots=5, stages=2, window=4)
MAX_TOKENS = 70
ENTRY_OF, CAPTURE = TOKEN.index("entry"), TOKEN.index("capture")


class Pair:
    """Two drivers with the same requests: one over PyTorch operations, one over the kernels."""

    def __init__(
        self,
        layout: Layout = LAYOUT,
        sae: SAE | None = None,
        width: int = WIDTH,
        whole: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        sae = sae or toy_sae(Random(0))
        dictionaries = {layout.sites[0]: {BUNDLE: sae}} if whole else {}
        layouts = [replace(layout, backend=backend) for backend in ("torch", "triton")]
        self.both = [
            Driver(one, build_banks(one, width, MAX_TOKENS, torch.device("cpu"), dictionaries, dtype))
            for one in layouts
        ]
        assert [driver.banks[0].by_kernels for driver in self.both] == [False, True]
        for driver in self.both:
            driver.load_sae(BUNDLE, sae)

    def admit(self, requests: dict[str, wire.Request]) -> None:
        for driver in self.both:
            for handle, (name, request) in enumerate(requests.items(), 1):
                driver.admit(name, handle, request)

    def run(self, chunks: Sequence[tuple[str, int, int]], xs: dict[str, Floats]) -> dict[str, Floats]:
        """Run a step, compare all that it leaves behind, and return the displacements."""
        expected, moves = (run_step(driver, chunks, xs) for driver in self.both)
        for name, move in expected.items():
            assert moves[name] == pytest.approx(move, rel=1e-5, abs=1e-5 * (1 + np.abs(move).max()))
        self.compare(sum(length for _, _, length in chunks))
        return moves

    def compare(self, tokens: int) -> None:
        expected, ours = (driver.banks for driver in self.both)
        for one, other in zip(expected, ours, strict=True):
            used = int(one.extent)
            f = [bank.activations[:tokens, :used] for bank in (other, one)]
            torch.testing.assert_close(*f, rtol=1e-5, atol=1e-5, equal_nan=True)
            assert not other.activations[:, used:].any()
            for flags in ("edited", "rejected"):
                assert torch.equal(getattr(other, flags)[:, :tokens], getattr(one, flags)[:, :tokens]), flags
            captured = one.token[CAPTURE, :tokens].long()
            captured = captured[captured > 0]
            assert torch.equal(other.before[captured].nan_to_num(1.5), one.before[captured].nan_to_num(1.5))
            after = [bank.after[captured].nan_to_num(1.5, 1e38, -1e38) for bank in (other, one)]
            torch.testing.assert_close(*after, rtol=1e-5, atol=1e-5)
        dense, theirs = expected[0].sequences, ours[0].sequences
        assert torch.equal(theirs.is_open[:, :tokens], dense.is_open[:, :tokens])
        for stage in range(self.both[0].layout.stages):
            gated = self.in_sequence(stage, tokens)
            for name in ("token_state", "token_alarms", "token_score"):
                torch.testing.assert_close(getattr(theirs, name)[stage, gated], getattr(dense, name)[stage, gated])

    def in_sequence(self, stage: int, tokens: int) -> Tensor:
        """The tokens [n] with a sequence condition."""
        entry = self.both[0].token[ENTRY_OF, :tokens].long()
        conditions = [bank.entries[stage, entry, ENTRY.index("sequence")] > 0 for bank in self.both[0].banks]
        return torch.stack(conditions).any(0).nonzero()[:, 0]


@pytest.mark.parametrize("seed", range(5))
def test_random_programs_in_chunks(seed: int) -> None:
    """Operations, units, gates, blends, caps and restored norms, in two stages, from the prompt to decode steps."""
    rng, tokens = Random(seed), 6
    pair = Pair()
    requests = {name: random_request(rng, LAYOUT, tokens) for name in "abc"}
    everything = random_request(rng, LAYOUT, tokens)
    requests["reads"] = wire.Request(2, tokens, False, everything.stages, watch_prompt=True, capture=True)
    pair.admit(requests)
    names = (*requests, "none")
    xs = {name: grid(rng, len(SITES), tokens, WIDTH, top=4) for name in names}
    moved = [pair.run([(name, 0, 4) for name in rng.sample(names, 5)], xs)]
    # One request has left the batch; then each decodes a token, or two.
    moved += [pair.run([(name, 4, 1 + (name == "a")) for name in names if name != "b"], xs)]
    moved += [pair.run([("c", 5, 1), ("none", 5, 1), ("reads", 5, 1)], xs)]
    assert not any(step["none"].any() for step in moved)


def test_comparisons_are_strict() -> None:
    """At its bound a row is not active, not edited, and opens no gate; and an inactive one is not clamped."""
    axes = np.eye(WIDTH, dtype="<f4")
    rows = tuple(wire.Row(encoder=axes[i].tobytes(), decoder=axes[i].tobytes(), threshold=0.5) for i in range(3))
    clamps = tuple(wire.Edit(i, scale=0.0, shift=-1.0, above=above) for i, above in enumerate((0.0, 2.0, 0.0)))
    pair = Pair()
    stages = {
        "clamped": ((wire.Site(0, rows, clamps),), ()),
        "gated": ((wire.Site(0, rows, clamps, gate=wire.Gate(((1, 2.0),))),), ()),
    }
    pair.admit({name: wire.Request(3, 3, False, stage) for name, stage in stages.items()})
    # Row 0 is at its threshold, row 1 at the bound of its edit and of the trigger, row 2 active, until the last token.
    x = np.zeros((len(SITES), 3, WIDTH))
    x[0, :, :3] = [(0.5, 2.0, 3.0), (0.5, 2.25, 3.0), (0.75, 2.0, 0.5)]
    moves = pair.run([("clamped", 0, 3), ("gated", 0, 3)], dict.fromkeys(stages, x))
    assert moves["clamped"][0, :, :3].tolist() == [[0, 0, -4.0], [0, -3.25, -4.0], [-1.75, 0, 0]]
    assert moves["gated"][0, :, :3].tolist() == [[0, 0, 0], [0, -3.25, -4.0], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(2))
def test_stages_that_are_capped_at_nothing_are_counted(seed: int) -> None:
    """So policies in shadow mode run."""
    rng, tokens = Random(seed), 6
    pair = Pair()

    def still(site: wire.Site) -> wire.Site:
        return msgspec.structs.replace(site, max_displacement=0.0)

    requests = {name: random_request(rng, LAYOUT, tokens) for name in "abc"}
    stages = {name: tuple(tuple(map(still, stage)) for stage in request.stages) for name, request in requests.items()}
    pair.admit({name: msgspec.structs.replace(request, stages=stages[name]) for name, request in requests.items()})
    xs = {name: grid(rng, len(SITES), tokens, WIDTH, top=4) for name in requests}
    moved = pair.run([(name, 0, 4) for name in requests], xs)
    assert not any(move.any() for move in moved.values())
    assert any(bank.edited.any() for bank in pair.both[0].banks)


def test_many_row_places_and_a_wide_stream() -> None:
    """More than one tile of tokens, rows and width, and more than one block of row places."""
    rng, width, latents = Random(0), 150, 310
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(latents, width, generator=generator) / width**0.5 for _ in range(2)]
    sae = SAE(weights[0], torch.zeros(latents), torch.zeros(latents), weights[1], torch.zeros(width))
    layout = Layout(SITES[:1], rows=300, slots=5)
    pair = Pair(layout, sae, width)
    chosen = rng.sample(range(latents), 270)
    rows = {name: tuple(wire.Row(BUNDLE, i) for i in chosen[n::3]) for n, name in enumerate("abc")}
    edits = [wire.Edit(i, scale=rng.choice((0.0, 1.0, 2.0)), shift=rng.choice((0.0, 1.0))) for i in range(0, 90, 3)]
    blend = wire.Blend(4, 0.5)
    programs = {
        name: wire.Request(9, 13, False, ((wire.Site(0, own, tuple(edits), blend if name == "b" else None),),))
        for name, own in rows.items()
    }
    pair.admit(programs)
    x = torch.randn(41, width, generator=generator)
    for driver in pair.both:
        driver.write_token_metadata([*"abc", "none"], np.zeros(4, np.int64), np.full(4, 10, np.int64))
    expected, move = (driver.banks[0](x) for driver in pair.both)
    torch.testing.assert_close(move, expected, rtol=1e-5, atol=1e-5)
    assert not move[30:].any()
    assert float(expected.abs().max()) > 0.5
    pair.compare(40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seed", range(2))
def test_edits_that_overflow_and_streams_that_are_not_finite(seed: int, dtype: torch.dtype) -> None:
    rng = Random(seed)
    layout = replace(ALL_POINTS, sites=ALL_POINTS.sites[::4])
    pair = Pair(layout, dtype=dtype)
    requests = [program(rng) for _ in range(3)]
    hooked = [
        msgspec.structs.replace(
            request, stages=tuple(tuple(s for s in st if s.site < len(layout.sites)) for st in request.stages)
        )
        for request in requests
    ]
    pair.admit(dict(zip("abc", hooked, strict=True)))
    for driver in pair.both:
        steps(driver, ["a", "b", "plain", "c"])
    x = stream(rng, 21, torch.float32)
    x[rng.randrange(20), 3], x[rng.randrange(20)], x[rng.randrange(20), 1] = inf, nan, 3e38
    rejected = 0
    for expected, ours in zip(*(driver.banks for driver in pair.both), strict=True):
        move, ours_move = expected(x), ours(x)
        scale = 1 + x.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True) + move.abs().amax(1, keepdim=True)
        assert float(((ours_move - move).abs() / scale).max()) < 1e-4
        rejected += int(expected.rejected.sum())
    pair.compare(20)
    assert rejected


@pytest.mark.parametrize("normalisation", list(Normalisation))
@pytest.mark.parametrize("selection", [None, TopK(3)])
def test_dictionaries_with_a_selection_or_a_normalisation(normalisation: Normalisation, selection: TopK | None) -> None:
    rng = Random(3)
    sae = replace(toy_sae(rng), normalisation=normalisation, selection=selection)
    pair = Pair(LAYOUT, sae, whole=True)
    site = wire.Site(
        0,
        (*(wire.Row(BUNDLE, i) for i in range(LATENTS)), wire.Row(decoder=np.ones(WIDTH, "<f4").tobytes())),
        (
            wire.Edit(0, scale=2.0),
            wire.Edit(3, shift=1.0, relative=True),
            wire.Edit(5, scale=0.0),
            wire.Edit(12, shift=1),
        ),
        gate=wire.Gate(((4, 0.0), (5, 0.5)), wire.Sequence(4, decay=0.5, gain=0.5, level=0.1)),
    )
    pair.admit({"a": wire.Request(3, 6, False, ((site,), (site,))), "b": wire.Request(2, 6, True, ((site,), ()))})
    xs = {name: grid(rng, len(SITES), 6, WIDTH, top=4) + 0.25 for name in ("a", "b", "none")}
    moves = pair.run([("a", 0, 6), ("none", 0, 6), ("b", 0, 6)], xs)
    assert moves["a"].any()
    assert moves["b"].any()


@pytest.mark.parametrize(("stages", "sequence_sites", "launches"), [(1, (), 2), (1, None, 3), (2, (), 4), (2, None, 6)])
def test_kernels_that_an_idle_site_launches(
    stages: int, sequence_sites: tuple[str, ...] | None, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []

    class Counted:
        """A kernel whose launches are counted."""

        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("products", "conditions", "edits"):
        monkeypatch.setattr(kernels, name, Counted(name))
    layout = Layout(SITES[:1], rows=8, slots=2, stages=stages, sequence_sites=sequence_sites, backend="triton")
    (bank,) = build_banks(layout, WIDTH, 8, torch.device("cpu"))
    x = torch.randn(5, WIDTH)
    x[2] = nan
    assert not bank(x).any()
    assert len(launched) == launches
    assert not bank.rejected.any()


class Calls(TorchDispatchMode):
    """Keeps the arguments of the operator's calls."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arguments: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.rudder.steer_stage.default:
            self.arguments.append(args)
        return operator(*args, **(kwargs or {}))


def test_the_operator_declares_what_it_writes() -> None:
    """torch.compile orders operators by it, and may give them copies of what they do not write."""
    pair = Pair()
    pair.admit({name: random_request(Random(1), LAYOUT, 5) for name in "ab"})
    xs = {name: grid(Random(2), len(SITES), 5, WIDTH, top=4) for name in "ab"}
    with Calls() as calls:
        run_step(pair.both[1], [("a", 0, 5), ("b", 0, 5)], xs)
    assert len(calls.arguments) == len(SITES) * LAYOUT.stages
    operator = torch.ops.rudder.steer_stage.default
    for arguments in calls.arguments:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from rudder.server.engine.worker import kernels
from rudder.server.engine.worker.worker import build_banks
from rudder.server.program.layout import Layout

class Device:
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, _device=0):
        return 0

class Compiled:
    def __init__(self, name):
        self.name, self.kernel = name, getattr(kernels, name)
    def __getitem__(self, grid):
        def compile(*args, **options):
            print(self.name, len(self.kernel.warmup(*args, grid=grid, **options).asm["cubin"]) > 0)
        return compile

driver.set_active(Device())
for name in ("products", "conditions", "edits"):
    setattr(kernels, name, Compiled(name))
(bank,) = build_banks(Layout(("layers.0.resid_post",), stages=2), 4096, 64, torch.device("cpu"))
bank.by_kernels = True
bank(torch.zeros(17, 4096))
"""


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """With the compiler that Triton brings, whose type rules the interpreter does not know."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, "90"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["products", "True", "conditions", "True", "edits", "True"] * 2, done.stderr
