"""How the programs of SmolLM2 are chosen, and that what is written can be served."""

from pathlib import Path

import msgspec
import pytest
import yaml

from rudder.sae_models.errors import UserError
from rudder.server.bench.programs import (
    LANGUAGE,
    LOOP,
    TOPICS,
    Key,
    Latent,
    Topics,
    Trial,
    best,
    edited,
    gated,
    loop,
    ranked,
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


def trial(gain: float, fluency: float = 0.0, loop: float = 0.0, kept: float = 1.0) -> Trial:
    return Trial("add", Program(), LATENTS, 0.1, gain, fluency, loop, kept)


def test_largest_gain_is_chosen_among_those_that_speak_and_leave_other_answers_alone() -> None:
    bad = [trial(9, fluency=LANGUAGE - 1), trial(8, kept=0.9), trial(7, loop=LOOP + 0.1)]
    assert best([trial(1), trial(3), *bad, trial(2)]).gain == 3
    with pytest.raises(UserError, match="no program"):
        best(bad)


def test_words_count_by_their_beginning() -> None:
    assert words_in(["The Stars, and (planets) of it."], ["star", "planet"]) == 2 / 6
    assert words_in([""], ["star"]) == 0


def test_answer_that_repeats_itself_is_a_loop() -> None:
    assert loop("I can see that I can see that I can see that") == 0.6
    assert loop("The night sky is a vast place, and you can see the stars.") == 0
    assert loop("Yes.") == 0


def test_latents_are_those_that_are_stronger_in_most_texts_of_the_topic_than_in_any_other() -> None:
    one, two, three, four = (Key("layers.9.resid_post", "a", index) for index in range(1, 5))
    inside = [{one: 5.0, two: 5.0, three: 5.0}, {one: 5.0, two: 5.0}]
    # The second is as strong elsewhere, once; the fourth is never active on the topic.
    found = ranked(inside, [{one: 1.0, two: 4.9}, {four: 9.0}])
    assert [latent.feature.index for latent in found] == [1, 3, 2]
    assert (found[0].elsewhere, found[0].here) == (1.0, 5.0)


def test_written_programs_can_be_served(tmp_path: Path) -> None:
    programs = strengths("more-astronomy", trial(1), "Adds {dose:g}.")
    write(tmp_path, programs | {"forget": (gated(edited(LATENTS[:1], "set", -0.1), LATENTS[:1]), "Forgets.")})
    read = load_programs(tmp_path)
    assert sorted(read) == ["forget", "more-astronomy", "more-astronomy-light", "more-astronomy-strong"]
    strong = read["more-astronomy-strong"]
    assert strong.description == "Adds 0.3."
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
    assert topics["other"].questions
    assert topics["other"].answers
