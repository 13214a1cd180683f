"""The configuration of a training run: the YAML file of `rudder train`, which the run keeps in its folder.

See rudder.sae_models.settings for the rules of YAML and overrides.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rudder.sae_models import settings
from rudder.sae_models.activations.hooks import Site, parse_site
from rudder.sae_models.activations.store import Precision
from rudder.sae_models.architectures import ARCHITECTURES
from rudder.sae_models.errors import UserError
from rudder.sae_models.settings import ConfigError as ConfigError
from rudder.sae_models.settings import config_error, line_of, unknown_field
from rudder.sae_models.training import trainer

Count = Annotated[int, Meta(gt=0)]
Position = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Activations between the model and the trainer."""

    store: Annotated[str | None, Meta(description="folder of the activation store; null: harvest on the fly")] = None
    precision: Annotated[Precision, Meta(description="dtype of the store; int8 has one scale per token")] = "bfloat16"
    tokens: Annotated[Count | None, Meta(description="tokens to store; null: the training split once")] = None
    block: Annotated[Count, Meta(description="tokens of the shuffle buffer, in memory")] = 400_000


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Measurements on held-out documents at the end of the run, and the catalogue."""

    tokens: Annotated[Count, Meta(description="held-out tokens for FVU, L0, density and shrinkage")] = 200_000
    loss_tokens: Annotated[Count, Meta(description="held-out tokens for the loss with the SAE spliced in")] = 40_000
    probe_windows: Annotated[int, Meta(ge=0, description="labelled held-out windows for the sparse probes")] = 2000
    catalogue_tokens: Annotated[Count, Meta(description="training tokens for the catalogue")] = 1_000_000


class Export(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The files of a bundle."""

    dtype: Annotated[
        Literal["float32", "bfloat16"], Meta(description="dtype of the SAE's matrices, rounded before the evaluation")
    ] = "float32"
    shard_bytes: Annotated[
        Count | None, Meta(description="bytes of the tensors in a file of weights; null: one file")
    ] = None
    compressed: Annotated[bool, Meta(description="compress the catalogue, to a quarter of its size")] = False


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Configuration of a training run."""

    model: Annotated[str, Meta(description="folder of a transformers model; optional with vectors")] = ""
    corpus: Annotated[
        str | None, Meta(description="text, JSON lines, Parquet, a saved dataset, or a folder of such files")
    ] = None
    chats: Annotated[
        str | None, Meta(description="beside corpus: chats with a model's own answers, which `rudder answer` writes")
    ] = None
    chat_share: Annotated[
        float, Meta(gt=0, lt=1, description="share of chats among the tokens of every part of the data")
    ] = 0.2
    images: Annotated[str | None, Meta(description="instead of corpus: folder of images, for a vision model")] = None
    vectors: Annotated[str | None, Meta(description="instead of corpus: an activation store of any model")] = None
    out: Annotated[str, Meta(description="folder of the run; the same command resumes from its last checkpoint")]
    sae: Annotated[dict[str, Any], Meta(description="the SAE to train")]
    sweep: Annotated[
        dict[str, list[Any]],
        Meta(description="fields of sae with lists of values; trains all combinations on one stream"),
    ] = {}
    tokens: Annotated[Count, Meta(description="tokens to train on, with repetition")] = 4_000_000
    batch: Annotated[Count, Meta(description="tokens per step, over all ranks")] = 512
    window: Annotated[int, Meta(ge=2, description="context length of the model, in tokens")] = 256
    prepend_bos: Annotated[
        bool | None,
        Meta(description="whether each context starts with BOS; null: as the tokenizer and the server do"),
    ] = None
    excluded_positions: Annotated[
        tuple[Position, ...],
        Meta(description="positions of a context, from 0, to leave out, such as a chat template's; BOS always is"),
    ] = ()
    exclude_special_tokens: Annotated[
        bool, Meta(description="leave out the tokenizer's special tokens, wherever they occur")
    ] = False
    seed: Annotated[int, Meta(ge=0, description="seed of the data order, and of each SAE without its own")] = 0
    warm_up: Annotated[Share, Meta(description="share of the run with a rising learning rate")] = trainer.Config.warm_up
    decay: Annotated[Share, Meta(description="share of the run with a falling learning rate")] = trainer.Config.decay
    dead_after: Annotated[
        Count | None, Meta(description="tokens without firing that make a latent dead; null: a twentieth of the run")
    ] = None
    log_every: Annotated[Count, Meta(description="steps between lines of metrics.jsonl")] = 100
    checkpoint_every: Annotated[Count, Meta(description="steps between checkpoints")] = 1000
    latent_ranks: Annotated[Count, Meta(description="processes of torchrun that shard the latents of an SAE")] = 1
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="auto: a GPU if available")] = "auto"
    credit: Annotated[str, Meta(description="attribution of the corpus, written into the bundle")] = ""
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
    export: Export = Export()


class SAESpec(msgspec.Struct, frozen=True, kw_only=True):
    """One SAE of a run. `settings` is the configuration of its architecture."""

    name: str
    architecture: str
    sites: tuple[str, ...]
    output_site: str | None
    seed: int
    settings: Any

    @property
    def all_sites(self) -> tuple[str, ...]:
        """The sites that it reads, and the one that it predicts."""
        return (*self.sites, *([self.output_site] if self.output_site else []))


# Far above any published SAE: more is a typing error.
MAX_LATENTS = 1 << 26
# Fields of which a run has exactly one: its source of activations.
ORIGINS = ("corpus", "images", "vectors")
EXAMPLE = {
    "model": "sae_models/pretrained/textbook-lm",
    "corpus": "textbooks.jsonl.xz",
    "out": "runs/textbook",
    "sweep": {"k": [16, 32, 64]},
}
EXAMPLE_SAE: dict[str, Any] = {"architecture": "batch_topk", "site": "layers.2.resid_post", "latents": 4096, "k": 32}
# Architectures whose sparsity is not k.
EXAMPLE_SWEEPS = {"adaptive_k": {"k_max": [160, 320]}}
# Architectures that read or predict other sites.
EXAMPLE_SITES: dict[str, dict[str, Any]] = {
    "route": {"site": ["layers.1.resid_post", "layers.2.resid_post"], "sites": 2},
    "transcoder": {"site": "layers.2.mlp_in", "output_site": "layers.2.mlp_out"},
}
# Fields of `sae` besides those of the architecture's configuration.
COMMON_SAE_FIELDS = {
    "name": "name of the bundle; null: the model and the site",
    "architecture": f"one of {', '.join(ARCHITECTURES)}",
    "site": "layers.<L>.<point>, or a list of sites for an architecture with a router",
    "output_site": "site that a transcoder predicts; null: the site itself",
    "seed": "seed of the initialization; null: that of the run",
}


def load(path: Path, overrides: Mapping[str, str] | None = None) -> Config:
    """Read the configuration of a YAML file and apply overrides (dotted field: text). ConfigError: names the field."""
    return check(settings.load(Config, path, overrides))


def convert(tree: Mapping[str, Any]) -> Config:
    """Convert plain values to a configuration. ConfigError: names the field."""
    return check(settings.convert(Config, tree))


def check(config: Config) -> Config:
    """Return the configuration if its fields agree with each other. ConfigError: names the field that does not."""
    if config.tokens < config.batch:
        raise ConfigError("tokens", f"{config.tokens} are less than a batch of {config.batch}")
    origins = [name for name in ORIGINS if getattr(config, name)]
    if len(origins) != 1:
        raise ConfigError("corpus", f"set one of {', '.join(ORIGINS)}; set: {' and '.join(origins) or 'none'}")
    if not config.model and not config.vectors:
        raise ConfigError("model", "is missing")
    if config.chats and not config.corpus:
        raise ConfigError("chats", "need a corpus beside them")
    if config.vectors and config.data.store:
        raise ConfigError("data.store", "vectors are a store already")
    if len(set(config.excluded_positions) & set(range(config.window))) == config.window:
        raise ConfigError("excluded_positions", f"hold all {config.window} positions of a window")
    sae_specs(config)
    return config


def sae_specs(config: Config) -> list[SAESpec]:
    """List the SAEs of a run, one for each combination of the sweep's values. ConfigError: names the field."""
    keys = list(config.sweep)
    if "name" in keys:
        raise ConfigError("sweep.name", "names follow from the other fields")
    specs = []
    for values in itertools.product(*config.sweep.values()):
        combination = dict(zip(keys, values, strict=True))
        # The name that follows from the model has the site in it.
        parts = {key: value for key, value in combination.items() if key != "site" or config.sae.get("name")}
        suffix = "".join(f"-{name_suffix(key, value)}" for key, value in parts.items())
        specs.append(sae_spec(config, config.sae | combination, suffix))
    if not specs or len({spec.name for spec in specs}) < len(specs):
        raise ConfigError("sweep", "a field without values, or a value twice")
    return specs


def name_suffix(key: str, value: Any) -> str:
    """Name a sweep's value in the name of a bundle: text by itself, a number after its field, as in `k32`."""
    return value.removesuffix(".resid_post") if isinstance(value, str) else f"{key}{value}"


def sae_spec(config: Config, sae: Mapping[str, Any], suffix: str) -> SAESpec:
    """Convert the `sae` field, with one combination of a sweep in it, to a spec. ConfigError: names the field."""
    architecture = sae.get("architecture", EXAMPLE_SAE["architecture"])
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ConfigError("sae.architecture", f"{architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    sites, output_site = parse_sites("site", sae.get("site")), sae.get("output_site")
    check_sites(architecture, sites, output_site)
    place = str(sites[-1]).removesuffix(".resid_post")
    origin = Path(config.model or config.vectors or "")
    return SAESpec(
        name=f"{sae.get('name') or f'{origin.resolve().name}-{place}'}{suffix}",
        architecture=architecture,
        sites=tuple(map(str, sites)),
        output_site=str(parse_sites("output_site", output_site)[0]) if output_site else None,
        seed=seed_of(config, sae),
        settings=architecture_settings(architecture, sae, len(sites)),
    )


def seed_of(config: Config, sae: Mapping[str, Any]) -> int:
    """Return the seed of an SAE, by default that of the run."""
    if sae.get("seed") is None:
        return config.seed
    if type(sae["seed"]) is not int:
        raise ConfigError("sae.seed", f"Expected `int`, got {sae['seed']!r}")
    return sae["seed"]


def architecture_settings(architecture: str, sae: Mapping[str, Any], sites: int) -> Any:
    """Convert the fields of `sae` that belong to the architecture to its configuration."""
    kind = ARCHITECTURES[architecture].config_type
    names = [field.name for field in dataclasses.fields(kind)]
    for key in sae:
        if key not in (*COMMON_SAE_FIELDS, *names):
            raise unknown_field(str(key), (*COMMON_SAE_FIELDS, *names), "sae.")
    own = {name: sae[name] for name in names if name in sae}
    if architecture == "route":
        own = {"sites": sites} | own
    try:
        converted = msgspec.convert(own, kind)
    except msgspec.ValidationError as error:
        raise config_error(error, kind, own, "sae.") from error
    if converted.latents > MAX_LATENTS:
        raise ConfigError("sae.latents", f"{converted.latents}, maximum {MAX_LATENTS}")
    if not 0 < converted.k <= converted.latents:
        raise ConfigError("sae.k", f"{converted.k} of {converted.latents} latents")
    return converted


def check_sites(architecture: str, sites: Sequence[Site], output_site: Any) -> None:
    """Raise ConfigError unless the architecture takes this number of sites, and an output site or none."""
    if (len(sites) > 1) != (architecture == "route"):
        raise ConfigError("sae.site", f"{len(sites)} for {architecture}; only route reads several, and needs them")
    if (output_site is not None) != (architecture == "transcoder"):
        raise ConfigError("sae.output_site", f"{output_site} for {architecture}; only transcoder has one, and needs it")


def parse_sites(field: str, value: Any) -> list[Site]:
    """Parse the site or the list of sites in a field of `sae`. ConfigError: no sites."""
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise ConfigError(f"sae.{field}", "is an empty list")
    try:
        return [parse_site(str(text)) for text in texts]
    except UserError as error:
        raise ConfigError(f"sae.{field}", str(error).removeprefix("site: ")) from error


def difference(first: Config, second: Config) -> str | None:
    """Return the first dotted field in which two configurations differ; None if they are equal."""
    a, b = msgspec.to_builtins(first), msgspec.to_builtins(second)
    for key in a:
        if a[key] != b[key]:
            section = a[key] if isinstance(a[key], dict) else {}
            inner = [name for name in section if section.get(name) != b[key].get(name)]
            return ".".join([key, *inner[:1]])
    return None


def dump(config: Config) -> str:
    """Write the configuration as YAML that `load` reads back."""
    return settings.dump(config)


def example(architecture: str = EXAMPLE_SAE["architecture"]) -> str:
    """Write a configuration for an architecture that `load` reads, with help text for each field."""
    sweep = EXAMPLE_SWEEPS.get(architecture, EXAMPLE["sweep"])
    lines = ["# rudder train FILE [--field VALUE ...]"]
    for line in settings.example(Config, EXAMPLE | {"sae": None, "sweep": sweep}):
        if line.startswith("sae:"):
            lines += [line.replace("sae: null", "sae:"), *(f"  {inner}" for inner in example_sae(architecture))]
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def example_sae(architecture: str) -> Iterator[str]:
    """Write the lines of the `sae` field of an example, with the docstring of the architecture's configuration."""
    values = EXAMPLE_SAE | {"architecture": architecture} | EXAMPLE_SITES.get(architecture, {})
    for name, text in COMMON_SAE_FIELDS.items():
        yield line_of(name, values.get(name), text)
    kind = ARCHITECTURES[architecture].config_type
    yield "# Fields of the architecture, with their defaults:"
    for part in reversed(kind.mro()[:-1]):
        yield from (f"# {line}".rstrip() for line in (inspect.getdoc(part) or "").splitlines())
    for field in dataclasses.fields(kind):
        default = None if field.default is dataclasses.MISSING else field.default
        yield line_of(field.name, values.get(field.name, default), "")
