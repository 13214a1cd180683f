"""Trains an SAE on a site of a causal language model and writes its bundle.

    python -m sae_models.training --corpus textbooks.jsonl.xz --model sae_models/pretrained/textbook-lm \\
        --site layers.2.resid_post --out sae_models/pretrained/textbook-lm-layers.2
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_models import bundle, catalogue
from sae_models.bundle import Bundle, Manifest, Model, Statistics, Training
from sae_models.sae import SAE
from sae_models.training import catalogue as entries
from sae_models.training import corpus, harvest, metrics, trainer
from sae_models.training.corpus import CorpusError, Document, Windows
from sae_models.training.sites import Site, parse_site

POOL_TOKENS = 400_000
SAMPLE_TOKENS = 100_000
CATALOGUE_TOKENS = 1_000_000
HELD_OUT_TOKENS = 200_000
LOSS_TOKENS = 40_000
CONFORMANCE_TOKENS = 512
CREDIT = "contains knowledge from OpenStax textbooks, CC BY 4.0"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sae_models.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        required=True,
        help="JSON lines (.jsonl or .jsonl.xz) with `text`, `book`, `module`, `title`",
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a transformers causal language model")
    parser.add_argument("--site", required=True, help="layers.<L>.resid_post or layers.<L>.resid_pre")
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle; its name is the bundle's name")
    parser.add_argument("--latents", type=positive, default=4096, help="size of the dictionary (default %(default)s)")
    parser.add_argument("--k", type=positive, default=32, help="mean active latents a token (default %(default)s)")
    parser.add_argument("--tokens", type=positive, default=4_000_000, help="tokens to train on (default %(default)s)")
    parser.add_argument(
        "--length", type=positive, default=256, help="tokens in a window, BOS included (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and order (default %(default)s)")
    parser.add_argument("--credit", default=CREDIT, help="line of attribution for the corpus (default: %(default)s)")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """An integer above 0."""
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def build(options: argparse.Namespace) -> Bundle:
    """Corpus to bundle: cut, harvest, train, measure, describe, write."""
    torch.manual_seed(options.seed)
    site = parse_site(options.site)
    trunk = harvest.load_trunk(options.model, site)
    documents = corpus.read(options.corpus)
    tokenizer = harvest.load_tokenizer(options.model)
    train, held_out = split(corpus.windows(documents, tokenizer, options.length), documents, options.seed)
    config = trainer.Config(options.latents, options.k, options.tokens, options.seed)
    sae = fit(trunk, site, train, config)
    sample = entries.sample_of(train.first(CATALOGUE_TOKENS), documents, tokenizer)
    sums = entries.tally(trunk, site, sae, sample)
    statistics = entries.statistics_of(sums)
    training, inputs = measure(trunk, site, sae, statistics, held_out, options)
    with tempfile.TemporaryDirectory() as scratch:
        database = Path(scratch) / bundle.CATALOGUE
        catalogue.write(database, entries.describe(sums, sample))
        manifest, vectors = manifest_of(options, sae, training), bundle.conformance_of(sae, inputs)
        return bundle.write(options.out, manifest, sae, statistics, vectors, database)


def split(windows: Windows, documents: Sequence[Document], seed: int) -> tuple[Windows, Windows]:
    """Training and held-out windows, shuffled; whole documents fall on one side."""
    held = corpus.in_folds(windows, documents, corpus.HELD_OUT_FOLDS)
    if held.all() or not held.any():
        raise CorpusError(f"corpus: {len(documents)} documents are too few to hold some out")
    return windows.where(~held).shuffled(seed), windows.where(held).shuffled(seed)


def fit(trunk: Any, site: Site, train: Windows, config: trainer.Config) -> SAE:
    """Harvests as many passes over the windows as the tokens ask for, and trains."""
    sample = harvest.counted_residuals(trunk, site, train.first(SAMPLE_TOKENS))
    passes = -(-config.tokens // int(train.counted.sum()))
    chunks = (
        x[counted]
        for seed in range(passes)
        for x, counted in harvest.residuals(trunk, site, train.shuffled(config.seed + seed))
    )
    generator = torch.Generator().manual_seed(config.seed)
    stream = harvest.batches(chunks, config.batch, POOL_TOKENS, generator)
    return trainer.train(stream, sample, config)


def measure(
    trunk: Any, site: Site, sae: SAE, statistics: Statistics, held_out: Windows, options: argparse.Namespace
) -> tuple[Training, Tensor]:
    """The manifest's figures on held-out sections, and residuals of them for the conformance vectors."""
    x = harvest.counted_residuals(trunk, site, held_out.first(HELD_OUT_TOKENS))
    fidelity = metrics.fidelity(sae, x)
    recovered = metrics.ce_recovered(
        harvest.load_model(options.model), site, sae, statistics.mean, held_out.first(LOSS_TOKENS)
    )
    dead = float((statistics.frequency == 0).float().mean())
    training = Training(options.tokens, options.seed, fidelity.l0, fidelity.fvu, recovered, dead, options.credit)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(options.seed))[:CONFORMANCE_TOKENS]
    return training, x[chosen]


def manifest_of(options: argparse.Namespace, sae: SAE, training: Training) -> Manifest:
    """The manifest but for the hashes of the files."""
    return bundle.describe(
        sae,
        name=options.out.name,
        model=Model(options.model.resolve().name, bundle.model_sha256(options.model), sae.width),
        sites=(options.site,),
        architecture="batch_topk",
        training=training,
        declared="dataset scalar",
        folded=("pre_bias", "input_scale"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with the reason on stderr."""
    try:
        built = build(arguments(argv))
    except (CorpusError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    training = built.manifest.training
    print(f"{built.path}: {built.manifest.latents} latents, FVU {training.fvu:.4f}, L0 {training.l0:.1f},", end=" ")
    print(f"CE recovered {training.ce_recovered:.4f}, dead {training.dead_share:.2%}, sha256 {built.sha256}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
