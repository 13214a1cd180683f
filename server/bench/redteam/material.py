"""What attacks ask and pad with."""

from pathlib import Path

import msgspec

from rudder.sae_models import PRETRAINED, settings

MATERIAL = PRETRAINED / "redteam.yaml"
# What turns a definition into the beginning of a sentence that the term ends, and the same without a definition.
ASKED, PRIOR = " is called", "This is called"


class Question(msgspec.Struct, frozen=True, array_like=True):
    """A definition, and the term that it defines."""

    definition: str
    term: str

    @property
    def asked(self) -> str:
        """The beginning of the sentence that the term ends."""
        return self.definition + ASKED


class Material(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`questions` about the topic that is to be forgotten; `benign`: sentences about others."""

    questions: tuple[Question, ...]
    benign: tuple[str, ...]


def load(path: Path = MATERIAL) -> Material:
    """Read the material. Raises ConfigError, which names the field at fault."""
    return settings.load(Material, path)


def passages(questions: tuple[Question, ...], count: int, length: int) -> list[str]:
    """Return `count` texts about the topic, of `length` definitions each."""
    texts = [f"{question.asked} {question.term}." for question in questions]
    return [" ".join(texts[number * length : (number + 1) * length]) for number in range(count)]


def padding(benign: tuple[str, ...], sentences: int, first: int = 0) -> str:
    """Return benign text of so many sentences, from number `first` on, again from the start where they end."""
    return " ".join(benign[(first + number) % len(benign)] for number in range(sentences))
