"""Write docs/architectures.md from what tests/engine/test_parity.py asserts: `make architectures`."""

from collections.abc import Iterator
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from rudder.sae_models.hookpoints import POINTS
from tests.engine import models

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """\
# Architectures and hook points

Written by `make architectures` from the cases of `tests/engine/test_parity.py`; do not edit. A random model of each
architecture runs in vLLM and in transformers. At each served hook point, what is read there and an edit of it give
the same log-probabilities within 1e-4 in float32, for prompt and generated tokens. A refused hook point stops the
start, with the reason.

An architecture that is not listed is not refused for that. How its layers represent the residual stream is measured
when the model is loaded, by dummy passes with random inputs (`sae_models/activations/measure.py`), and a hook point
is refused by name unless:

| hook point | what must hold |
|---|---|
| all | the layer runs once in a forward pass, and passes on one vector of the model's width per token |
| `resid_pre` | the layer's output depends on `hidden_states` and `residual` through their sum, or not on `residual` |
| `attn_out`, `mlp_out` | `resid_pre + attn_out + mlp_out = resid_post`, also after an edit of either |
| `resid_mid` | `mlp_out` depends on `resid_pre` and `attn_out` through their sum |
| `mlp_in` | `mlp_out` depends on it, and `attn_out` does not |
| `resid_post` | it is the next layer's `resid_pre` |

`attn_out` and `mlp_out` are what is added to the stream: behind a norm that follows the branch, and times a residual
multiplier. Harvesting measures causal language models in the same way.

"""


def lines() -> Iterator[str]:
    """Yield the lines of the table, and of the reasons behind it."""
    yield f"| architecture | {' | '.join(f'`{point}`' for point in POINTS)} | compiled |"
    yield "|---" * (len(POINTS) + 2) + "|"
    reasons: list[str] = []
    for name in sorted(models.ARCHITECTURES | models.OTHERS, key=lambda name: CLASSES[name].lower()):
        refused = models.REFUSED.get(name, {})
        reasons += [reason for reason in refused.values() if reason not in reasons]
        cells = [f"refused ({1 + reasons.index(refused[point])})" if point in refused else "served" for point in POINTS]
        compiled = "tested" if name in models.ARCHITECTURES else ""
        yield f"| `{CLASSES[name]}` | {' | '.join(cells)} | {compiled} |"
    yield ""
    for number, reason in enumerate(reasons, 1):
        yield f"({number}) {reason}."


def document() -> str:
    """Return the text of docs/architectures.md."""
    return HEAD + "\n".join(lines()) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
