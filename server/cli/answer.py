"""`rudder answer`: write a chat corpus with a model's own answers."""

import asyncio
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from rudder.sae_models.activations import corpus, prompts
from rudder.server.cli.arguments import command

DESCRIPTION = """\
Write a chat corpus: prompts in a model's chat template, with the model's own answers, sampled by a vLLM engine.

`rudder train` takes it as `chats`, beside the corpus. A run that was stopped goes on with the same command.
"""
EXAMPLES = """\
examples:
  rudder answer --model MODEL --out chats.jsonl
  rudder answer --model MODEL --topics textbooks.jsonl.xz --chats 2000 --out chats.jsonl
"""


def main(argv: Sequence[str]) -> None:
    """Answer prompts, and print the file and the number of new tokens."""
    parser = command("answer", DESCRIPTION, EXAMPLES)
    parser.add_argument("--model", required=True, help="folder of a model with a chat template")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="chat corpus to write")
    parser.add_argument(
        "--prompts",
        type=Path,
        default=prompts.SHIPPED,
        metavar="FILE.jsonl",
        help="lines with a `text`, in which {topic} stands for a term of a glossary; default: the shipped ones",
    )
    parser.add_argument("--topics", type=Path, metavar="CORPUS", help="corpus whose glossaries hold the terms")
    parser.add_argument("--chats", type=int, default=1000, metavar="N", help="number of chats (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts and the answers (default: 0)")
    args = parser.parse_args(argv)
    documents = corpus.read(args.topics) if args.topics else []
    chosen = islice(prompts.prompts(prompts.templates(args.prompts), documents, args.seed), args.chats)

    from rudder.server.engine.answers import Sampling, write_answers

    tokens = asyncio.run(write_answers(args.model, chosen, args.out, Sampling(seed=args.seed)))
    print(f"{args.out}: {tokens} new tokens")
