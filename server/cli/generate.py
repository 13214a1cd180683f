"""`rudder generate`: generate from a prompt."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from rudder.server.cli.arguments import MAX_UINT64, add_prompt, command, connect, integer, program_of, prompt_of, utf8
from rudder.server.cli.output import out, print_end_of_choice
from rudder_client import Report, Structured

SAMPLING: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (integer(), "maximum number of tokens to generate (16, of a chat 200)"),
    "temperature": (float, "0: greedy (1.0, of a chat 0.2)"),
    "top_p": (float, "sample from the most probable tokens that make up this probability (1.0, of a chat 0.9)"),
    "top_k": (integer(), "sample from this number of most probable tokens"),
    "seed": (integer(maximum=MAX_UINT64), "seed of the sampling"),
    "n": (integer(), "number of choices"),
}
# An answer is longer than the engine's default, and small models keep to their point at low temperatures.
CHAT: dict[str, Any] = {"max_tokens": 200, "temperature": 0.2, "top_p": 0.9}
EXAMPLES = """\
examples:
  rudder generate "The night sky" --max-tokens 40
  rudder generate "The night sky" --program more-astronomy --temperature 0.7 --top-features 5
  rudder generate "The night sky" --topic astronomy --strength 0.5 --max-tokens 40
  rudder generate "The capital of France is" --regex " (Paris|London)"
  echo "What is a cell?" | rudder generate - --chat
"""


def main(argv: Sequence[str]) -> None:
    """Print the chunks of one choice as they arrive, or each of several choices when it is complete."""
    args = parser().parse_args(argv)
    sampling = sampling_of(args)
    report = Report(top_k=args.top_features, pooled=True, tokens=False) if args.top_features else None
    if args.regex or args.json_schema:
        sampling["structured"] = Structured(regex=args.regex, json_schema=args.json_schema)
    text = prompt_of(args)
    prompt: Any = [{"role": "user", "content": text}] if args.chat else text
    texts: dict[int, str] = {}
    with connect(args) as client:
        for chunk in client.generate(prompt, steer=program_of(args), report=report, stop=args.stop, **sampling):
            texts[chunk.choice] = texts.get(chunk.choice, "") + chunk.text
            if (args.n or 1) == 1:
                out.print(chunk.text, end="", markup=False, soft_wrap=True)
            elif chunk.finish_reason:
                out.rule(f"{chunk.choice}")
                out.print(texts[chunk.choice], markup=False)
            if chunk.finish_reason:
                out.print()
                print_end_of_choice(chunk)


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling parameters that were set, and those that are better defaults for a chat."""
    values = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    return CHAT | values if args.chat else values


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    generate = command("generate", "Generate from a prompt, streamed.", EXAMPLES)
    add_prompt(generate)
    generate.add_argument("--chat", action="store_true", help="send the prompt as the user's message of a chat")
    for name, (kind, text) in SAMPLING.items():
        generate.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    generate.add_argument("--stop", type=utf8, action="append", default=[], help="stop string; may be repeated")
    form = generate.add_mutually_exclusive_group()
    form.add_argument("--regex", type=utf8, help="regular expression that the output must match")
    form.add_argument("--json-schema", type=utf8, metavar="JSON", help="JSON schema that the output must match")
    help_top = "report the K strongest features of each token, pooled over the output"
    generate.add_argument("--top-features", type=integer(), default=0, metavar="K", help=help_top)
    return generate
