"""Recipes of the programs that ship with the demonstration model."""

from collections.abc import Callable

from rudder.sae_models.analysis.derive import Material, Recipe, Topic, forget, steer
from rudder.sae_models.analysis.program import Program

MICROBIOLOGY = Topic(("microbiology",), ("anatomy-physiology", "chemistry"))
ASTRONOMY = Topic(("astronomy",))
HISTORY = Topic(
    ("us-history", "world-history"),
    ignored=("life-liberty-and-pursuit-happiness", "american-government", "introduction-political-science"),
)

FORGET_MICROBIOLOGY = """\
Microbiology becomes inaccessible where a text speaks of it; other text is left alone. A linear detector feeds a \
CUSUM. While that is above its level, tokens on which the detector is above {token_level:g}, or one of {latents} \
latents is active, have all of these latents set to {dose:g} residual norms. How it was chosen: the latents by \
frequency on microbiology, below {ceiling:.0%} on the other books and {ratio:g} times as frequent as on \
anatomy-physiology or chemistry; the detector by logistic regression with {neighbour_weight:.0%} of its negative \
weight on those two; both on four fifths of the sections. The level is the one that {false_alarms:.0%} of the benign \
windows of another tenth pass, most of them from those two books. The dose was chosen on such a tenth with an earlier \
model, among -0.1, -0.15, -0.2 and blends towards the mean of weight 0.6 to 1: it is the one that left text fluent. A \
last tenth of the sections was kept for the report."""
MORE_ASTRONOMY = """\
Speaks of astronomy. Adds {value:g} residual norms to each of the {latents} latents that are most frequent on \
astronomy among those {ratio:g} times as frequent there as in any other book."""
LESS_ASTRONOMY = """\
Avoids astronomy. Sets each of the {latents} latents that are most frequent on astronomy among those {ratio:g} times \
as frequent there as in any other book to {value:g} residual norms where it is active."""
LESS_HISTORY = """\
Avoids history. Adds {value:g} residual norms to each of the {latents} latents that are most frequent on U.S. and \
world history among those {ratio:g} times as frequent there as in any other book; books on government were left out."""


def forget_microbiology(material: Material, name: str) -> Program:
    """Derive a program that forgets microbiology."""
    recipe = Recipe()
    return forget(material, MICROBIOLOGY, recipe, name, FORGET_MICROBIOLOGY.format(**vars(recipe)))


# By the end of a program's name.
MORE = {"-light": 0.05, "": 0.1, "-strong": 0.2}
LESS = {"-light": -0.1, "": -0.2, "-strong": -0.5}


def more_astronomy(material: Material, name: str) -> Program:
    """Derive a program that adds the latents of astronomy."""
    return astronomy(material, name, "add", MORE[name.removeprefix("more-astronomy")], MORE_ASTRONOMY)


def less_astronomy(material: Material, name: str) -> Program:
    """Derive a program that turns the latents of astronomy around where they are active."""
    return astronomy(material, name, "clamp", LESS[name.removeprefix("less-astronomy")], LESS_ASTRONOMY)


def astronomy(material: Material, name: str, operation: str, value: float, description: str) -> Program:
    """Derive a program on the latents of astronomy."""
    recipe = Recipe(latents=8, ratio=3.0, windows_of_topic=80)
    text = description.format(value=value, **vars(recipe))
    return steer(material, ASTRONOMY, recipe, operation, value, name, text)


def less_history(material: Material, name: str) -> Program:
    """Derive a program that subtracts the latents of history."""
    recipe = Recipe(latents=8, windows_of_topic=80)
    return steer(material, HISTORY, recipe, "add", -0.1, name, LESS_HISTORY.format(value=-0.1, **vars(recipe)))


SHIPPED: dict[str, Callable[[Material, str], Program]] = {
    "forget-microbiology": forget_microbiology,
    **{f"more-astronomy{strength}": more_astronomy for strength in MORE},
    **{f"less-astronomy{strength}": less_astronomy for strength in LESS},
    "less-history": less_history,
}
