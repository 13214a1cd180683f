"""Step 3: Rudder against plain vLLM, alternating in one run, at the shape of Llama 8B with random weights.

`bench`: one site, idle, one and many programs, watched features. `sites`: every layer has a site. `dictionary`: a TopK
SAE that every step encodes whole, and a request's top-k latents of it.
"""

from typing import Any

import msgspec

from rudder.server.bench import engine
from rudder.server.bench.load import WATCHED, Load
from tests.gpu.report import NO_GPU, PASSED, Figures, Report, arguments

FULL = Load(
    shape="llama-8b",
    requests=256,
    prompt_tokens=256,
    new_tokens=256,
    starts=1,
    pairs=2,
    warm_up="start",
    programs=256,
    latents=4096,
)
PROGRAMS = f"{FULL.programs}_programs"
LOADS: dict[str, dict[str, Any]] = {
    "bench": {"cases": ("idle", "one_program", PROGRAMS, f"watch_{WATCHED}_features")},
    "sites": {"sites": 32, "cases": ("idle", "one_program", PROGRAMS)},
    "dictionary": {"latents": 65536, "k": 64, "cases": ("idle", "one_program", "full_encode_64k")},
}
# Ratios to reach on an H100 or H200 (docs/benchmarks/README.md), by step and case.
GOALS = {
    "bench": {"idle": 0.99, "one_program": 0.99, PROGRAMS: 0.98},
    "sites": {"idle": 0.95, "one_program": 0.95, PROGRAMS: 0.95},
    "dictionary": {"idle": 0.92, "one_program": 0.92, "full_encode_64k": 0.92},
}
TINY: dict[str, Any] = {
    "shape": "tiny", "requests": 4, "prompt_tokens": 16, "new_tokens": 8, "pairs": 1, "programs": 2, "rows": 160,
    "eager": True, "latents": 1024,
}  # fmt: skip


def load_of(name: str, tiny: bool) -> Load:
    """Return the load of a step; `tiny`: with the same cases on a small model."""
    load = msgspec.structs.replace(FULL, **LOADS[name])
    if not tiny:
        return load
    load = msgspec.structs.replace(load, **TINY, sites=min(load.sites, 2))
    names = {PROGRAMS: "2_programs", "full_encode_64k": "full_encode_1k"}
    return msgspec.structs.replace(load, cases=tuple(names.get(case, case) for case in load.cases))


def figures_of(case: dict[str, Any], goal: float | None) -> Figures:
    """Return the headline figures of a case."""
    names = ("ratio", "tok_s", "plain_tok_s", "tpot_ms", "plain_tpot_ms", "first_token_ms", "plain_first_token_ms")
    wanted = {} if goal is None else {"goal": goal, "reached": case["ratio"] >= goal}
    return wanted | {name: case[name] for name in names} | {"pairs": len(case["pairs"])}


def main() -> int:
    """Run the step."""
    options = arguments(__doc__, "name")
    load = load_of(options.name, options.tiny)
    suffix = ", tiny model on a CPU" if options.tiny else ""
    report = Report(options.out, [f"{case}{suffix}" for case in load.cases])

    def add_cases(result: dict[str, Any]) -> None:
        for name, case in result["cases"].items():
            goal = GOALS[options.name].get(name)
            figures = {"pairs": len(case["pairs"])} if options.tiny else figures_of(case, goal)
            report.add(f"{name}{suffix}", PASSED, figures=figures)

    def measure() -> Figures:
        result = engine.run(load, None, add_cases)
        return (
            {"shape": load.shape, "requests": load.requests, "sites": load.sites, "latents": load.latents}
            | ({"k": load.k} if load.k else {})
            | {"tokens": f"{load.prompt_tokens} + {load.new_tokens}", "device": result["machine"]["device"]}
        )

    report.run("load", measure)
    if options.tiny:
        report.not_run("speed at the shape of Llama 8B", NO_GPU)
    return report.exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
