"""Check a configuration before anything slow begins: without PyTorch, vLLM or a model, in a fraction of a second.

What needs the weights is checked where they are loaded: `engine.start`, `bundle.check_model`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from rudder.sae_models import PRETRAINED
from rudder.sae_models.hookpoints import FORM, SITE, parse
from rudder.server.config import Audit, Config, ConfigError, Engine, Monitoring, WatchedFeature, is_loopback
from rudder.server.identity.authenticator import authenticator_of
from rudder.server.program.named import load_policies, load_programs

DEMO = "install rudder-server[demo], or set engine.model, engine.bundles and programs.folder"
# Names of one figure in the config.json of different architectures.
HIDDEN_SIZE, LAYERS = ("hidden_size", "n_embd", "d_model"), ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class BundleFacts:
    """What the manifest of a bundle says of it."""

    name: str
    sites: tuple[str, ...]
    latents: int
    hidden_size: int


@dataclass(frozen=True)
class ModelShape:
    """Figures of a model's config.json; None where it names them otherwise."""

    hidden_size: int | None
    layers: int | None


def check(config: Config) -> Config:
    """Return the configuration with the folder of a model that it names by its Hugging Face name, and no revision.

    To check the result again changes nothing. Raises ConfigError, ProgramFileError.
    """
    engine = msgspec.structs.replace(config.engine, model=str(model_folder(config.engine)), revision=None)
    config = msgspec.structs.replace(config, engine=engine)
    shape = model_shape(Path(config.engine.model), config.engine.load_format)
    bundles = [bundle_facts(path) for path in config.engine.bundles]
    check_sites(config, bundles, shape)
    check_nodes(config.engine)
    check_watched(config.watch, {bundle.name: bundle for bundle in bundles})
    check_folders(config)
    check_door(config)
    check_audit(config.audit)
    check_monitoring(config.monitoring)
    return config


def check_nodes(engine: Engine) -> None:
    """Raise ConfigError unless the devices can be spread over the machines, and this is one of them."""
    if engine.node_rank >= engine.nodes:
        raise ConfigError("engine.node_rank", f"is {engine.node_rank}, of {engine.nodes} machines from 0")
    if engine.tensor_parallel_size % engine.nodes:
        problem = f"{engine.tensor_parallel_size} devices cannot be spread over {engine.nodes} machines evenly"
        raise ConfigError("engine.tensor_parallel_size", problem)


def check_monitoring(monitoring: Monitoring) -> None:
    """Raise ConfigError if the bounds of buckets do not increase."""
    for field in ("latency_bounds_s", "token_bounds_s"):
        bounds = getattr(monitoring, field) or ()
        if any(after <= before for before, after in pairwise(bounds)):
            raise ConfigError(f"monitoring.{field}", "each bound must be above the one before")


def check_audit(audit: Audit) -> None:
    """Raise ConfigError if a field of the audit log has no log to belong to, or the log has no key."""
    for field in ("key_file", "head", "webhook", "webhook_secret_file"):
        if audit.folder is None and getattr(audit, field) is not None:
            raise ConfigError("audit.folder", f"is null: audit.{field} belongs to it")
    if audit.folder is None:
        return
    if audit.key_file is None or not is_file(audit.key_file):
        problem = "is null" if audit.key_file is None else f"{audit.key_file!r} is not a file"
        raise ConfigError("audit.key_file", f"{problem}: name one that `rudder audit key FILE` has written")


def check_door(config: Config) -> None:
    """Raise ConfigError if the services would be open to others than this machine by oversight, or a file is wrong."""
    for field, path in msgspec.structs.asdict(config.tls).items():
        if path and not config.tls.certificate:
            raise ConfigError("tls.certificate", f"is missing: tls.{field} belongs to it")
        if path and not is_file(path):
            raise ConfigError(f"tls.{field}", f"{path!r} is not a file")
    if config.tls.certificate and not config.tls.key:
        raise ConfigError("tls.key", "is missing: it belongs to tls.certificate")
    if config.identity.certificates and not config.tls.client_ca:
        raise ConfigError("tls.client_ca", "is missing: identity.certificates needs verified client certificates")
    authenticator_of(config.identity, lambda _: None)
    host = config.listen.host
    if is_loopback(host):
        return
    if not (config.tls.certificate or config.listen.allow_plaintext):
        problem = f"{host} is reached from other machines: name a certificate, or set listen.allow_plaintext"
        raise ConfigError("tls.certificate", problem)
    if not (config.identity.required or config.identity.allow_anonymous):
        problem = f"{host} is reached from other machines: name a file of tokens, or set identity.allow_anonymous"
        raise ConfigError("identity.tokens", problem)


def model_folder(config: Engine) -> Path:
    """Return the folder of a model: itself, or the snapshot of a Hugging Face name in the local cache."""
    model = config.model
    if is_folder(model):
        if config.revision is not None:
            raise ConfigError("engine.revision", f"{model} is a folder, which has no revisions")
        return Path(model)
    if PRETRAINED in Path(model).parents:
        raise ConfigError("engine.model", f"{model} is not there: {DEMO}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=config.revision, local_files_only=True))
    except (OSError, ValueError) as error:
        problem = f"{model!r} is neither a folder nor in the local Hugging Face cache"
        raise ConfigError("engine.model", f"{problem}: name a folder, or run `hf download` first") from error


def is_file(path: str) -> bool:
    """Return whether a path is a file; False for one that no file system can have."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: str) -> bool:
    """Return whether a path is a folder; False for one that no file system can have."""
    try:
        return bool(path) and Path(path).is_dir()
    except (OSError, ValueError):
        return False


def model_shape(folder: Path, load_format: str) -> ModelShape:
    """Read config.json of a model's folder, which must have weights too, unless they are random."""
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError("engine.model", f"no config.json in {folder}")
    if load_format != "dummy" and not any(folder.glob("*.safetensors")):
        raise ConfigError("engine.model", f"no safetensors file in {folder}")
    fields = read_object(file, "engine.model")
    text = fields.get("text_config")
    fields = text if isinstance(text, dict) else fields
    return ModelShape(whole_number(fields, HIDDEN_SIZE), whole_number(fields, LAYERS))


def whole_number(fields: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """Return the first of these fields that is a whole number."""
    return next((value for name in names if isinstance(value := fields.get(name), int)), None)


def read_object(file: Path, field: str) -> dict[str, Any]:
    """Read a JSON object. Raises ConfigError, which names `field`."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(field, f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(field, f"{file}: is not an object")
    return content


def bundle_facts(path: str) -> BundleFacts:
    """Read what the checks need from the manifest of a bundle; `bundle.load` checks all of it."""
    if not is_folder(path):
        hint = f": {DEMO}" if PRETRAINED in Path(path).parents else ""
        raise ConfigError("engine.bundles", f"{path!r} is not a folder{hint}")
    file = Path(path) / "manifest.json"
    fields = read_object(file, "engine.bundles")
    try:
        name, latents, hidden_size = str(fields["name"]), int(fields["latents"]), int(fields["model"]["hidden_size"])
        return BundleFacts(name, tuple(map(str, fields["sites"])), latents, hidden_size)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("engine.bundles", f"{file}: {type(error).__name__} {error}") from error


def check_sites(config: Config, bundles: Sequence[BundleFacts], shape: ModelShape) -> None:
    """Raise ConfigError unless there is a site, every site is in the model, and no two bundles share a name."""
    if len({bundle.name for bundle in bundles}) < len(bundles):
        raise ConfigError("engine.bundles", "two bundles have the same name")
    sites = list(sites_of(config, bundles))
    if not sites:
        raise ConfigError("engine.bundles", "is empty, and so is engine.sites: name a bundle or a site to hook")
    for field, site in sites:
        if not SITE.fullmatch(site):
            raise ConfigError(field, f"{site!r} is not {FORM}")
        if shape.layers is not None and parse(site)[0] >= shape.layers:
            raise ConfigError(field, f"{site}: the model has {shape.layers} layers, from layers.0")
    known = {site for _, site in sites}
    for site in config.engine.sequence_sites or ():
        if site not in known:
            raise ConfigError("engine.sequence_sites", f"{site!r} is not one of {', '.join(sorted(known))}")
    for bundle in bundles:
        if shape.hidden_size not in (None, bundle.hidden_size):
            problem = f"{bundle.name} fits a hidden size of {bundle.hidden_size}, the model has {shape.hidden_size}"
            raise ConfigError("engine.bundles", problem)


def sites_of(config: Config, bundles: Sequence[BundleFacts]) -> Iterator[tuple[str, str]]:
    """Yield the sites to hook, each with the field that names it."""
    yield from (("engine.bundles", site) for bundle in bundles for site in bundle.sites)
    yield from (("engine.sites", site) for site in config.engine.sites)


def check_watched(watch: Sequence[WatchedFeature], bundles: Mapping[str, BundleFacts]) -> None:
    """Raise ConfigError unless every watched feature is one of a bundle that is served."""
    for number, watched in enumerate(watch):
        bundle = bundles[watched_bundle(watched, tuple(bundles), number)]
        if watched.index >= bundle.latents:
            problem = f"{bundle.name} has latents 0 to {bundle.latents - 1}, not {watched.index}"
            raise ConfigError(f"watch[{number}].index", problem)
        if watched.site is not None and watched.site not in bundle.sites:
            problem = f"{watched.site!r} is not a site of {bundle.name}: {', '.join(bundle.sites)}"
            raise ConfigError(f"watch[{number}].site", problem)


def watched_bundle(watched: WatchedFeature, served: Sequence[str], number: int) -> str:
    """Return the name of the bundle of `watch[number]`. Raises ConfigError if it is not served, or not the only one."""
    field = f"watch[{number}].bundle"
    if watched.bundle is None and len(served) == 1:
        return served[0]
    if watched.bundle is None:
        raise ConfigError(field, f"name one of {', '.join(served)}" if served else "no bundle is served")
    if watched.bundle not in served:
        raise ConfigError(field, f"no bundle {watched.bundle!r} is served; served: {', '.join(served) or 'none'}")
    return watched.bundle


def check_folders(config: Config) -> None:
    """Raise ConfigError or ProgramFileError unless the files of programs and policies can be read."""
    read_program_folder("programs.folder", config.programs.folder, load_programs)
    read_program_folder("policies.folder", config.policies.folder, load_policies)


def read_program_folder(field: str, folder: str | None, load: Callable[[Path], object]) -> None:
    """Read all files of a folder that a field of the configuration names."""
    if folder is None:
        return
    if not is_folder(folder):
        hint = f": {DEMO}" if PRETRAINED in Path(folder).parents else ""
        raise ConfigError(field, f"{folder!r} is not a folder{hint}")
    load(Path(folder))
