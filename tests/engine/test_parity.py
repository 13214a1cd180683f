"""Edits in vLLM against the same edits by plain hooks on transformers, in batches of different programs."""

import gc
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from rudder.sae_models.hookpoints import POINTS
from rudder.server.engine.traced import code_digest
from rudder.server.program import wire
from rudder.server.program.layout import Layout
from tests.engine import models, transformers_hooks
from tests.engine.device import MEMORY_SHARE, ON_GPU, WORKER

SITES = ("layers.0.resid_pre", "layers.1.attn_out", "layers.1.mlp_out", "layers.1.resid_post", "layers.2.resid_pre")
# Only in models whose MLP reads what the attention branch wrote.
MIDDLE = "layers.1.resid_mid"
LAST = "layers.2.resid_post"
PROMPTS = ([1, 5, 9, 20, 33, 47], [1, 60, 61, 62], [1, 5, 9, 20, 33, 47], [1, 99, 98, 97, 96, 95, 94, 93])
NEW_TOKENS = 4
WIDTH = 64


def vector(seed: int, norm: float) -> bytes:
    """A random direction as a row's bytes."""
    v = np.random.default_rng(seed).normal(size=WIDTH)
    return (v * norm / np.linalg.norm(v)).astype("<f4").tobytes()


def row(seed: int, threshold: float) -> wire.Row:
    """A row with an encoder and a decoder."""
    return wire.Row(encoder=vector(seed, 1.0), decoder=vector(seed + 100, 1.0), bias=0.1, threshold=threshold)


def layout_of(folder: Path) -> Layout:
    """The sites of a model."""
    refused = models.REFUSED.get(folder.name, {})
    points = tuple(f"layers.1.{point}" for point in POINTS if point not in refused)
    return Layout(tuple({*SITES, *points, LAST}), rows=16, slots=8, sequence_sites=SITES[3:4])


def program_at(layout: Layout, site: str) -> tuple[wire.Site, ...]:
    """A program that moves what it reads at one site: if what it reads is wrong, so are the answers."""
    return (wire.Site(layout.sites.index(site), (row(9, -inf),), (wire.Edit(0, scale=4.0, shift=2.0),)),)


def programs(layout: Layout) -> list[tuple[wire.Site, ...]]:
    """Two programs that together use every site, unit, phase and option."""
    push = wire.Row(decoder=vector(1, 1.0))
    mean = wire.Row(decoder=vector(2, 4.0), threshold=inf)
    on = layout.sites.index
    middle = (
        [wire.Site(on(MIDDLE), (row(8, 0.0),), (wire.Edit(0, scale=0.0, shift=-1.5),))]
        if MIDDLE in layout.sites
        else []
    )
    return [
        (
            wire.Site(on("layers.0.resid_pre"), (push,), (wire.Edit(0, shift=0.5, relative=True),)),
            wire.Site(on("layers.1.resid_post"), (row(3, 0.0), row(4, -0.2)), (
                wire.Edit(0, scale=0.0, shift=-2.0, above=0.0), wire.Edit(1, upper=0.3, generated=False),
            ), restore_norm=True),
            *middle,
        ),
        (
            wire.Site(on("layers.1.attn_out"), (row(5, -inf),), (wire.Edit(0, scale=3.0),)),
            wire.Site(on("layers.1.mlp_out"), (row(6, -inf),), (wire.Edit(0, scale=0.0, shift=1.5, relative=True),)),
            wire.Site(on("layers.2.resid_pre"), (mean, row(7, 0.1)), (wire.Edit(1, lower=1.0, prompt=False),),
                      blend=wire.Blend(0, 0.4), max_displacement=0.5),
        ),
    ]  # fmt: skip


def programs_at_each_site(layout: Layout) -> list[tuple[wire.Site, ...] | None]:
    """No program, and one at each served hook point of layer 1 and behind the last layer."""
    return [None, *(program_at(layout, site) for site in layout.sites if site.startswith("layers.1.") or site == LAST)]


# An engine for each. Compiling takes most of the time: one architecture of each layout always runs compiled (a residual
# beside the hidden states, one stream, norms behind the branches), the others in `make test-long`.
ALWAYS_COMPILED = ("llama", "gpt2", "gemma2")
CASES = [
    *((name, "eager") for name in models.ARCHITECTURES | models.OTHERS),
    *(
        pytest.param(name, "compiled", marks=() if name in ALWAYS_COMPILED else pytest.mark.long)
        for name in models.ARCHITECTURES
    ),
]
on_each_engine = pytest.mark.parametrize(("folder", "llm"), CASES, indirect=True, scope="module")


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each architecture, in a folder of its name."""
    return models.write(request.param, tmp_path_factory.mktemp("model") / request.param)


class Expected(NamedTuple):
    """Answers of transformers, (greedy ids, log-probabilities [tokens, vocabulary]): by prompt, and by site."""

    answers: list[tuple[list[int], np.ndarray]]
    at_sites: list[tuple[list[int], np.ndarray]]


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    """Compute them before vLLM loads the model: it patches the classes of models that it runs through transformers."""
    model, layout = transformers_hooks.load(folder), layout_of(folder)
    pairs = zip(PROMPTS, program_of_each_prompt(layout), strict=True)
    answers = [answer_of_transformers(model, prompt, program, layout) for prompt, program in pairs]
    plain, *steered = (
        answer_of_transformers(model, PROMPTS[0], program, layout) for program in programs_at_each_site(layout)
    )
    for _, logprobs in (*steered, answers[0]):
        assert np.abs(plain[1][0] - logprobs[0]).max() > 0.05, "the edits must show, or this test shows nothing"
    return Expected(answers, [plain, *steered])


@pytest.fixture(scope="module")
def llm(request: pytest.FixtureRequest, folder: Path, expected: object) -> Iterator[Any]:  # noqa: ARG001
    """An engine in this process, so that nothing but the worker differs from plain vLLM."""
    # Some layers compile a norm by themselves, which takes half a minute.
    torch.compiler.set_stance("force_eager" if request.param == "eager" else "default")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.utils.counter import Counter

    more = {"gpu_memory_utilization": MEMORY_SHARE} if ON_GPU else {}
    engine = LLM(
        model=str(folder), dtype="float32", worker_cls=WORKER,
        skip_tokenizer_init=True,
        additional_config=layout_of(folder).additional_config(code_digest()), enforce_eager=request.param == "eager",
        max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 26,
        distributed_executor_backend="uni", max_logprobs=-1, **more,
    )  # fmt: skip
    # A request id is the request's handle, of which 0 is none.
    engine.request_counter = Counter(1)
    yield engine
    torch.compiler.set_stance("default")
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


def program_of_each_prompt(layout: Layout) -> list[tuple[wire.Site, ...] | None]:
    """The program of each prompt."""
    first, second = programs(layout)
    return [first, second, None, first]


def answers_of_vllm(
    llm: Any, prompts: Sequence[list[int]], programs: Sequence[tuple[wire.Site, ...] | None]
) -> list[tuple[list[int], np.ndarray]]:
    """(greedy ids, log-probabilities [tokens, vocabulary]) of all prompts in one batch."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=-1,
            extra_args={wire.EXTRA_ARG: wire.encode(wire.Request(len(prompt), 64, True, (program or (),)))},
        )
        for prompt, program in zip(prompts, programs, strict=True)
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [
        (list(o.outputs[0].token_ids), np.array([by_token_id(step) for step in o.outputs[0].logprobs])) for o in outputs
    ]


def by_token_id(step: dict[int, Any]) -> list[float]:
    """A step's log-probabilities by token id."""
    return [step[i].logprob for i in range(models.VOCAB)]


@torch.no_grad()
def answer_of_transformers(
    model: torch.nn.Module, prompt: list[int], program: tuple[wire.Site, ...] | None, layout: Layout
) -> tuple[list[int], np.ndarray]:
    """(greedy ids, log-probabilities [tokens, vocabulary]) of one prompt."""
    ids: list[int] = []
    logprobs = []
    for _ in range(NEW_TOKENS):
        with transformers_hooks.hooked(model, program or (), layout.sites, len(prompt)):
            logits = model(torch.tensor([prompt + ids])).logits[0, -1]
        logprobs.append(torch.log_softmax(logits.double(), -1).numpy())
        ids.append(int(logits.argmax()))
    return ids, np.array(logprobs)


def assert_equal(
    answers: Sequence[tuple[list[int], np.ndarray]], expected: Sequence[tuple[list[int], np.ndarray]]
) -> None:
    """Assert that answers of vLLM are those of transformers."""
    for (ids, ours), (their_ids, theirs) in zip(answers, expected, strict=True):
        assert ids == their_ids
        assert np.abs(ours - theirs).max() < 1e-4


@on_each_engine
def test_logits_equal_those_of_transformers(llm: Any, expected: Expected, folder: Path) -> None:
    answers = answers_of_vllm(llm, PROMPTS, program_of_each_prompt(layout_of(folder)))
    assert_equal(answers, expected.answers)


@on_each_engine
def test_each_hook_point_is_read_and_edited_as_in_transformers_or_refused(
    llm: Any, expected: Expected, folder: Path
) -> None:
    programs = programs_at_each_site(layout_of(folder))
    assert_equal(answers_of_vllm(llm, [PROMPTS[0]] * len(programs), programs), expected.at_sites)
    (refusals,) = llm.collective_rpc("rudder_refusals")
    assert refusals[1] == models.REFUSED.get(folder.name, {})
