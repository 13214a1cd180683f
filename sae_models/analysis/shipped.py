"""The programs that ship with the demonstration model, and the choices behind them."""

from collections.abc import Callable

from sae_models.analysis.derive import Material, Recipe, Topic, forget, steer
from sae_models.analysis.program import Program

MICROBIOLOGY = Topic(("microbiology",), ("anatomy-physiology", "chemistry"))
ASTRONOMY = Topic(("astronomy",), ("college-physics",))
HISTORY = Topic(("us-history", "world-history"), ("american-government",))

FORGET_MICROBIOLOGY = """\
Microbiology becomes inaccessible while it is spoken of; other text is left alone. A linear detector of microbiology \
feeds a CUSUM; while that is above its level, tokens at which the detector is above {token_level:g} or one of {latents} \
latents fires are replaced by the mean residual. Chosen on {folds} of the corpus's sections: latents by frequency on \
microbiology (below {ceiling:.0%} on the other books, {ratio:g} times as frequent as on anatomy-physiology and \
chemistry), the detector by logistic regression with {neighbour_weight:.0%} of its negative weight on those two. The \
level lets {false_alarms:.0%} of benign windows of other sections pass it, most of them of those two books."""


def forget_microbiology(material: Material, name: str) -> Program:
    """Blends what speaks of microbiology towards the mean."""
    recipe = Recipe()
    return forget(material, MICROBIOLOGY, recipe, name, FORGET_MICROBIOLOGY.format(folds="four fifths", **vars(recipe)))


def more_astronomy(material: Material, name: str) -> Program:
    """Adds astronomy's latents."""
    recipe = Recipe(latents=8, windows_of_topic=200)
    description = "Speaks of astronomy: adds to the latents most frequent on astronomy and rare elsewhere."
    return steer(material, ASTRONOMY, recipe, "add", 0.15, name, description)


def less_history(material: Material, name: str) -> Program:
    """Clamps history's latents where they are active."""
    recipe = Recipe(latents=32, windows_of_topic=200)
    description = "Avoids history: clamps the latents most frequent on the two history books and rare elsewhere."
    return steer(material, HISTORY, recipe, "clamp", -0.5, name, description)


SHIPPED: dict[str, Callable[[Material, str], Program]] = {
    "forget-microbiology": forget_microbiology,
    "more-astronomy": more_astronomy,
    "less-history": less_history,
}
