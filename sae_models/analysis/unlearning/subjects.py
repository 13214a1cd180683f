"""What a study measures: a whole model, or the rig's model behind an edit."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rudder.sae_models.analysis.unlearning.generation import sample
from rudder.sae_models.analysis.unlearning.rig import Edit, Rig, Texts, run_edited, run_whole


class Reading(NamedTuple):
    """Of each scored next token [n, length - 1]: log p, and whether it is the most likely one; and the tokens that an
    edit touches [n, length].
    """

    log_p: Tensor
    hits: Tensor
    touched: Tensor

    def take(self, index: Tensor) -> "Reading":
        """Select the texts with these indices."""
        return Reading(*(part[index] for part in self))


class Subject(Protocol):
    """A model under study."""

    def read(self, texts: Texts, plain: Reading) -> Reading:
        """Read texts; `plain` is what the rig's model reads."""
        ...

    def sample(self, prompts: Tensor, tokens: int, seed: int) -> Tensor:
        """Continue prompts [n, length] by so many tokens [n, tokens]."""
        ...


@dataclass(frozen=True)
class Whole:
    """A model without an edit."""

    model: Any

    def read(self, texts: Texts, plain: Reading | None = None) -> Reading:  # noqa: ARG002
        """Read texts."""
        return Reading(*run_whole(self.model, texts), torch.zeros_like(texts.windows.counted))

    def sample(self, prompts: Tensor, tokens: int, seed: int) -> Tensor:
        """Continue prompts."""
        return sample(self.model, prompts, tokens, seed)


@dataclass(frozen=True)
class Edited:
    """The rig's model behind an edit at its site."""

    rig: Rig
    edit: Edit

    def read(self, texts: Texts, plain: Reading) -> Reading:
        """Read texts; those that the edit does not touch are read as the model reads them."""
        return Reading(*run_edited(self.rig, texts, self.edit, (plain.log_p, plain.hits)))

    def sample(self, prompts: Tensor, tokens: int, seed: int) -> Tensor:
        """Continue prompts."""
        return sample(self.rig.model, prompts, tokens, seed, self.rig.site, self.edit, self.rig.begins_with_bos)
