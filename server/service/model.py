"""The methods of ModelService: what is served, and within which limits."""

from rudder import server
from rudder.sae_models.bundle.bundle import Bundle
from rudder.server.engine.adapter import VLLM_VERSION
from rudder.server.program.rows import Dictionary
from rudder.server.service.serving import Serving
from rudder.v1 import catalogue_pb2


def get_model(serving: Serving) -> catalogue_pb2.ModelServiceGetResponse:
    """Return model, sites, bundles with hashes, and limits."""
    engine = serving.engine
    return catalogue_pb2.ModelServiceGetResponse(
        model=engine.model.name,
        model_sha256=engine.model.sha256,
        hidden_size=engine.model.hidden_size,
        layers=engine.model.layers,
        max_model_len=engine.model.max_model_len,
        sites=[site_info(serving, site) for site in engine.registry.layout.sites],
        bundles=map(bundle_info, engine.bundles.values(), engine.registry.dictionaries.values()),
        limits=limits_of(serving),
        server_version=server.__version__,
        engine_version=VLLM_VERSION,
        engine_epoch=engine.epoch,
    )


def list_programs(serving: Serving) -> catalogue_pb2.ListProgramsResponse:
    """Return the operator's programs, and the policies that bind every caller."""
    engine = serving.engine
    return catalogue_pb2.ListProgramsResponse(
        programs=[
            catalogue_pb2.NamedProgram(
                name=name,
                description=named.message.description,
                digest=named.compiled.digest,
            )
            for name, named in engine.programs.items()
        ]
        + [
            catalogue_pb2.NamedProgram(
                name=policy.name, description=policy.message.description, digest=policy.digest, always=True
            )
            for policy in serving.policies.in_force.values()
            if policy.message.binds.all and not policy.shadow
        ]
    )


def site_info(serving: Serving, site: str) -> catalogue_pb2.SiteInfo:
    """Describe a hooked site and its bundles."""
    names = [name for name, bundle in serving.engine.bundles.items() if bundle.manifest.site == site]
    return catalogue_pb2.SiteInfo(site=site, rows=serving.engine.registry.layout.rows, bundles=names)


def bundle_info(bundle: Bundle, dictionary: Dictionary) -> catalogue_pb2.BundleInfo:
    """Describe a bundle by its manifest, and whether programs can edit its latents."""
    manifest, problem = bundle.manifest, dictionary.whole_only or dictionary.watched_only
    return catalogue_pb2.BundleInfo(
        name=manifest.name,
        sha256=bundle.sha256,
        site=manifest.site,
        architecture=manifest.architecture,
        latents=manifest.latents,
        l0=manifest.training.l0,
        fvu=manifest.training.fvu,
        output_site=manifest.output_site,
        activation=str(manifest.activation.__struct_config__.tag),
        editable=not problem,
        not_editable_because=problem,
    )


def limits_of(serving: Serving) -> catalogue_pb2.Limits:
    """Return the limits that the contract publishes: those configured, and the bank's."""
    limits, layout = serving.bounds.limits, serving.engine.registry.layout
    names = [name for name in catalogue_pb2.Limits.DESCRIPTOR.fields_by_name if hasattr(limits, name)]
    configured = {name: getattr(limits, name) for name in names}
    return catalogue_pb2.Limits(**configured, rows_per_site=layout.rows, slots=layout.slots)
