"""How the programs of SmolLM2 are chosen, and that what is written can be served."""

from pathlib import Path

import msgspec
import yaml

from rudder.server.bench.programs import (
    LANGUAGE,
    TOPICS,
    Latent,
    Topics,
    Trial,
    best,
    edited,
    gated,
    strengths,
    words_in,
    write,
)
from rudder.server.program.named import load_programs
from rudder_client import Feature, Program

LATENTS = [
    Latent("layers.9.resid_post", Feature(3, "a"), 2.0, 5.0),
    Latent("layers.14.resid_post", Feature(5, "b"), 0.0, 5.0),
]


def trial(gain: float, fluency: float = 0.0, kept: float = 1.0) -> Trial:
    return Trial("add", Program(), 2, 0.1, gain, fluency, kept)


def test_largest_gain_is_chosen_among_those_that_speak_and_leave_other_answers_alone() -> None:
    trials = [trial(1), trial(3), trial(9, fluency=LANGUAGE - 1), trial(8, kept=0.9), trial(2)]
    assert best(trials).gain == 3
    # Where none does, the largest gain is still reported.
    assert best(trials[2:4]).gain == 9


def test_words_count_by_their_beginning() -> None:
    assert words_in(["The Stars, and (planets) of it."], ["star", "planet"]) == 2 / 6
    assert words_in([""], ["star"]) == 0


def test_written_programs_can_be_served(tmp_path: Path) -> None:
    programs = strengths("more-astronomy", LATENTS, trial(1), "Adds {dose:g} to {count} latents.")
    write(tmp_path, programs | {"forget": (gated(edited(LATENTS[:1], "set", -0.1), LATENTS[:1]), "Forgets.")})
    read = load_programs(tmp_path)
    assert sorted(read) == ["forget", "more-astronomy", "more-astronomy-light", "more-astronomy-strong"]
    strong = read["more-astronomy-strong"]
    assert strong.description == "Adds 0.3 to 2 latents."
    assert [(site.site, site.edits[0].row.feature.bundle, site.edits[0].add) for site in strong.sites] == [
        ("layers.9.resid_post", "a", 0.3),
        ("layers.14.resid_post", "b", 0.3),
    ]
    (trigger,) = read["forget"].gate.any_of
    assert (trigger.row.feature.index, trigger.above) == (3, 2.4)
    assert read["forget"].sites[0].edits[0].set == -0.1


def test_a_latent_that_is_never_active_elsewhere_does_not_open_the_gate_at_any_activation() -> None:
    (trigger,) = gated(edited(LATENTS[1:], "set", -0.1), LATENTS[1:]).message.gate.any_of
    assert trigger.above == 1.5


def test_topics_are_complete() -> None:
    topics = msgspec.convert(yaml.safe_load(TOPICS.read_text(encoding="utf-8")), dict[str, Topics])
    assert set(topics) == {"astronomy", "microbiology", "other"}
    assert topics["astronomy"].far
    assert topics["astronomy"].near
    assert topics["microbiology"].answers
    assert topics["other"].answers
