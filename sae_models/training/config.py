"""The one description of a run: this tree is the YAML file, and the record that the run keeps of itself."""

import dataclasses
import difflib
import inspect
import itertools
import json
import re
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from rudder.sae_models.activations.hooks import Site, parse_site
from rudder.sae_models.activations.store import Precision
from rudder.sae_models.architectures import ARCHITECTURES
from rudder.sae_models.training import trainer

Count = Annotated[int, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message begins with the dotted field that is wrong."""


class Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e6 for text; here it is a number."""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    number = float(loader.construct_scalar(node))
    return int(number) if number.is_integer() else number


EXPONENT = re.compile(r"[-+]?[0-9][0-9.]*[eE][-+]?[0-9]+")
Loader.add_implicit_resolver("!exponent", EXPONENT, list("-+0123456789"))
Loader.add_constructor("!exponent", _number)


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How activations come from the model to the trainer."""

    store: Annotated[str | None, Meta(description="folder to keep them in; null: each process harvests on the fly")] = (
        None
    )
    precision: Annotated[Precision, Meta(description="of the store; int8 has a scale a token")] = "bfloat16"
    tokens: Annotated[Count | None, Meta(description="tokens to store; null: the whole training split once")] = None
    block: Annotated[Count, Meta(description="tokens in memory, mixed with each other")] = 400_000


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is measured at the end, on sections that the run did not train on; and the catalogue."""

    tokens: Annotated[Count, Meta(description="held-out tokens for FVU, L0, density and shrinkage")] = 200_000
    loss_tokens: Annotated[Count, Meta(description="held-out tokens for the loss with the SAE spliced in")] = 40_000
    probe_windows: Annotated[int, Meta(ge=0, description="labelled held-out windows for the sparse probes")] = 2000
    catalogue_tokens: Annotated[Count, Meta(description="training tokens that the catalogue is made from")] = 1_000_000


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything a run is told."""

    model: Annotated[str, Meta(description="folder of a transformers model; with vectors it is not needed")] = ""
    corpus: Annotated[
        str | None, Meta(description="text, JSON lines, Parquet, a saved dataset, or a folder of such files")
    ] = None
    images: Annotated[str | None, Meta(description="or: a folder of images, for a vision model")] = None
    vectors: Annotated[str | None, Meta(description="or: a store of vectors (training/store.py), of any model")] = None
    out: Annotated[str, Meta(description="folder of the run; the same command goes on with what it holds")]
    sae: Annotated[dict[str, Any], Meta(description="what is trained")]
    sweep: Annotated[
        dict[str, list[Any]], Meta(description="keys of sae, each with values: all combinations, on one stream")
    ] = {}
    tokens: Annotated[Count, Meta(description="to train on, with repetition")] = 4_000_000
    batch: Annotated[Count, Meta(description="tokens a step, over all ranks")] = 512
    window: Annotated[int, Meta(ge=2, description="tokens of a text that the model sees at once")] = 256
    seed: Annotated[int, Meta(ge=0, description="of the order, and of an SAE that has none of its own")] = 0
    warm_up: Annotated[Share, Meta(description="share of the run in which the rate rises")] = trainer.Config.warm_up
    decay: Annotated[Share, Meta(description="share of the run in which it falls")] = trainer.Config.decay
    dead_after: Annotated[
        Count | None, Meta(description="tokens without firing that make a latent dead; null: a twentieth of the run")
    ] = None
    log_every: Annotated[Count, Meta(description="steps between two lines of metrics.jsonl")] = 100
    checkpoint_every: Annotated[Count, Meta(description="steps between two checkpoints: what a kill can cost")] = 1000
    latent_ranks: Annotated[Count, Meta(description="processes of torchrun that share the latents of an SAE")] = 1
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="auto: a GPU if there is one")] = "auto"
    credit: Annotated[str, Meta(description="line of attribution for the corpus, kept in the bundle")] = ""
    data: Data = Data()
    evaluation: Evaluation = Evaluation()


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """One SAE of a run. `settings` is the architecture's own configuration."""

    name: str
    architecture: str
    sites: tuple[str, ...]
    output_site: str | None
    seed: int
    settings: Any

    @property
    def all_sites(self) -> tuple[str, ...]:
        """Those read, and the one written."""
        return (*self.sites, *([self.output_site] if self.output_site else []))


# Far above any that was published: what is meant to be more is a slip of the pen.
MOST_LATENTS = 1 << 26
# What a run may be trained on.
ORIGINS = ("corpus", "images", "vectors")
EXAMPLE = {
    "model": "sae_models/pretrained/textbook-lm",
    "corpus": "textbooks.jsonl.xz",
    "out": "runs/textbook",
    "sweep": {"k": [16, 32, 64]},
}
EXAMPLE_SAE: dict[str, Any] = {"architecture": "batch_topk", "site": "layers.2.resid_post", "latents": 4096, "k": 32}
# Where k is not what is swept.
EXAMPLE_SWEEPS = {"adaptive_k": {"k_max": [160, 320]}}
# What architectures of several sites read and write.
EXAMPLE_SITES: dict[str, dict[str, Any]] = {
    "route": {"site": ["layers.1.resid_post", "layers.2.resid_post"], "sites": 2},
    "transcoder": {"site": "layers.2.mlp_in", "output_site": "layers.2.mlp_out"},
}
# Keys of `sae` beside the fields of the architecture's configuration.
OWN = {
    "name": "of the bundle; null: the model and the site",
    "architecture": f"one of {', '.join(ARCHITECTURES)}",
    "site": "layers.<L>.<point>, or a list of sites for an architecture that routes",
    "output_site": "what a transcoder predicts; null: the site itself",
    "seed": "of the initialisation; null: that of the run",
}


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, with `key=value` in place of what it says. ConfigError names the field."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: is not a mapping of keys")
    for override in overrides:
        _set(tree, override)
    return convert(tree)


def _set(tree: dict[str, Any], override: str) -> None:
    """Puts `a.b=value` into a tree; the value is written as in YAML."""
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{override}: is not key=value")
    *parents, last = dotted.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{dotted}: {key} has no keys")
    try:
        tree[last] = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{dotted}: {error}") from error


def convert(tree: Mapping[str, Any]) -> Config:
    """The configuration of a tree of plain values. ConfigError names the field."""
    require_known(tree, Config.__struct_fields__, "")
    for name, part in (("data", Data), ("evaluation", Evaluation)):
        if isinstance(tree.get(name), Mapping):
            require_known(tree[name], part.__struct_fields__, f"{name}.")
    try:
        config = msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        raise ConfigError(f"{place.strip('.`') or 'configuration'}: {problem}") from error
    if config.tokens < config.batch:
        raise ConfigError(f"tokens: {config.tokens} are less than a batch of {config.batch}")
    _check_origin(config)
    trained(config)
    return config


def _check_origin(config: Config) -> None:
    """ConfigError unless a run is told what to train on, once."""
    given = [key for key in ORIGINS if getattr(config, key)]
    if len(given) != 1:
        raise ConfigError(f"corpus: give one of {', '.join(ORIGINS)}; {' and '.join(given) or 'none'} is given")
    if not config.model and not config.vectors:
        raise ConfigError("model: is not given")
    if config.vectors and config.data.store:
        raise ConfigError("data.store: vectors are a store already")


def require_known(given: Mapping[str, Any], known: Collection[str], prefix: str) -> None:
    """ConfigError for a key that there is not, with the one that may have been meant."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise ConfigError(f"{prefix}{key}: there is no such key; {hint}")


def trained(config: Config) -> list[Trained]:
    """The SAEs of a run, one for each combination of the sweep's values."""
    keys = list(config.sweep)
    if "name" in keys:
        raise ConfigError("sweep.name: names follow from the other keys")
    found = []
    for values in itertools.product(*config.sweep.values()):
        suffix = "".join(f"-{_named(key, value)}" for key, value in zip(keys, values, strict=True) if key != "site")
        found.append(_one(config, config.sae | dict(zip(keys, values, strict=True)), suffix))
    if not found or len({sae.name for sae in found}) < len(found):
        raise ConfigError("sweep: a key without values, or a value twice")
    return found


def _named(key: str, value: Any) -> str:
    return str(value) if isinstance(value, str) else f"{key}{value}"


def _one(config: Config, given: dict[str, Any], suffix: str) -> Trained:
    name = given.get("architecture", "batch_topk")
    if name not in ARCHITECTURES:
        raise ConfigError(f"sae.architecture: {name!r} is not one of {', '.join(ARCHITECTURES)}")
    kind = ARCHITECTURES[name].config_type
    fields = [field.name for field in dataclasses.fields(kind)]
    require_known(given, (*OWN, *fields), "sae.")
    sites, output_site = _sites(given.get("site")), given.get("output_site")
    _check_sites(name, sites, output_site)
    try:
        told = {key: given[key] for key in fields if key in given}
        settings = msgspec.convert({"sites": len(sites)} | told if name == "route" else told, kind)
        seed = msgspec.convert(config.seed if given.get("seed") is None else given["seed"], int)
    except msgspec.ValidationError as error:
        raise ConfigError(f"sae: {error}") from error
    if settings.latents > MOST_LATENTS:
        raise ConfigError(f"sae.latents: {settings.latents}, at most {MOST_LATENTS}")
    if not 0 < settings.k <= settings.latents:
        raise ConfigError(f"sae.k: {settings.k} of {settings.latents} latents")
    place = str(sites[-1]).removesuffix(".resid_post")
    origin = Path(config.model or config.vectors or "")
    base = given.get("name") or f"{origin.resolve().name}-{place}"
    return Trained(
        name=f"{base}{suffix}",
        architecture=name,
        sites=tuple(map(str, sites)),
        output_site=str(_sites(output_site)[0]) if output_site else None,
        seed=seed,
        settings=settings,
    )


def _check_sites(architecture: str, sites: Sequence[Site], output_site: Any) -> None:
    if (len(sites) > 1) != (architecture == "route"):
        raise ConfigError(f"sae.site: {len(sites)} for {architecture}; several are for route, which needs them")
    if (output_site is not None) != (architecture == "transcoder"):
        raise ConfigError(f"sae.output_site: {output_site} for {architecture}; it is for transcoder, which needs it")


def _sites(given: Any) -> list[Site]:
    texts = given if isinstance(given, list) else [given]
    try:
        return [parse_site(str(text)) for text in texts]
    except ValueError as error:
        raise ConfigError(f"sae.{error}") from error


def difference(one: Config, other: Config) -> str | None:
    """The first field in which two configurations differ, dotted."""
    a, b = msgspec.to_builtins(one), msgspec.to_builtins(other)
    for key in a:
        if a[key] != b[key]:
            inner = (
                [name for name in a[key] if a[key].get(name) != b[key].get(name)] if isinstance(a[key], dict) else []
            )
            return ".".join([key, *inner[:1]])
    return None


def dump(config: Config) -> str:
    """The configuration as YAML that `load` reads."""
    text: str = yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, allow_unicode=True)
    return text


def example(architecture: str = EXAMPLE_SAE["architecture"]) -> str:
    """A configuration with a line of help for each key, which `load` reads, for an architecture."""
    lines = ["# rudder train FILE [key=value ...]"]
    for name, default, text in described(Config):
        if name == "sae":
            lines += [f"sae:  # {text}", *(f"  {line}" for line in _example_of_sae(architecture))]
        elif isinstance(default, Data | Evaluation):
            lines += [f"{name}:", *(f"  {_line(*field)}" for field in described(type(default)))]
        else:
            value = EXAMPLE_SWEEPS.get(architecture) if name == "sweep" else None
            lines.append(_line(name, value or EXAMPLE.get(name, default), text))
    return "\n".join(lines) + "\n"


def described(kind: type[msgspec.Struct]) -> Iterator[tuple[str, Any, str]]:
    """Name, default and help of each field."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        metas = [meta for meta in getattr(hints[field.name], "__metadata__", ()) if isinstance(meta, Meta)]
        default = (
            field.default_factory() if field.default is msgspec.NODEFAULT and not field.required else field.default
        )
        yield field.name, default, next((meta.description for meta in metas if meta.description), "") or ""


def _example_of_sae(architecture: str) -> Iterator[str]:
    values = EXAMPLE_SAE | {"architecture": architecture} | EXAMPLE_SITES.get(architecture, {})
    for name, text in OWN.items():
        yield _line(name, values.get(name), text)
    kind = ARCHITECTURES[architecture].config_type
    yield "# Of the architecture, with its defaults:"
    for part in reversed(kind.mro()[:-1]):
        yield from (f"# {line}".rstrip() for line in (inspect.getdoc(part) or "").splitlines())
    for field in dataclasses.fields(kind):
        default = None if field.default is dataclasses.MISSING else field.default
        yield _line(field.name, values.get(field.name, default), "")


def _line(name: str, value: Any, text: str) -> str:
    return f"{name}: {json.dumps(value)}" + (f"  # {text}" if text else "")
