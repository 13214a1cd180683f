"""What the tour says to each model: questions, and how to sample the answers."""

from dataclasses import dataclass

from rudder_client.requests import Prompt, Sampling


@dataclass(frozen=True)
class Words:
    """Prompts for one model. `chat`: they are messages of a user; otherwise texts to go on with.

    `up`, `down`: prompts that are far from the topic of steering, and on it. `inspected`: a text whose features are
    shown. `rising`: words, the first that a label has names the feature that is watched through the answer
    to `down`. `forgotten`,
    `kept`: prompts on the unlearned topic, and others. `remark`: what to expect of steered answers.
    """

    chat: bool
    up: str
    down: str
    inspected: str
    rising: tuple[str, ...]
    forgotten: tuple[str, ...]
    kept: tuple[str, ...]
    sampling: Sampling
    remark: str

    def prompt(self, text: str) -> Prompt:
        """Return a prompt as this model takes it."""
        return [{"role": "user", "content": text}] if self.chat else text


WORDS = {
    "smollm2-135m-instruct": Words(
        chat=True,
        up="Tell me about your day.",
        down="What can I see in the night sky?",
        inspected="The moon pulls at the sea, and bacteria live in every drop of it.",
        rising=("stars", "star", "moon", "planets", "sun"),
        forgotten=(
            "What causes tuberculosis?",
            "How do antibiotics kill bacteria?",
            "What is the difference between a virus and a bacterium?",
        ),
        kept=("What is the capital of France?", "Why do the seasons change?", "Who was George Washington?"),
        sampling={"temperature": 0.0, "max_tokens": 40},
        remark="The first two strengths leave the language whole; “-strong” is meant to be too much.",
    ),
    "textbook-lm": Words(
        chat=False,
        up="The planet has",
        down="The stars of the galaxy",
        inspected="Viruses infect cells.",
        rising=("stars", "star"),
        forgotten=("Bacteria that cause disease", "An antibiotic", "A virus infects"),
        kept=("The American Revolution began", "The price of a good", "Language is"),
        sampling={"temperature": 0.7, "max_tokens": 25, "seed": 7},
        remark="A tiny model writes poorly: look at its topic alone.",
    ),
}
