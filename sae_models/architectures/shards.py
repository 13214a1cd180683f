"""Tensor parallelism of an architecture: each process holds a shard of the latents."""

import torch
from torch import Tensor

from rudder.sae_models.architectures.architecture import Architecture
from rudder.sae_models.errors import UserError
from rudder.sae_models.sparse.collectives import Mesh


def shard(architecture: Architecture, mesh: Mesh) -> Architecture:
    """Reduce the architecture to this process's shard of the latents, in place. Raise ValueError if the latents do not
    divide.
    """
    architecture.mesh = mesh
    if architecture.config.latents % mesh.latent_parts:
        raise UserError(f"latent_ranks: {mesh.latent_parts} does not divide the {architecture.config.latents} latents")
    for name, parameter in architecture.named_parameters():
        parameter.data = _local_shard(architecture, name, parameter.data)
    for name, buffer in list(architecture.named_buffers()):
        setattr(architecture, name, _local_shard(architecture, name, buffer))
    return architecture


def _local_shard(architecture: Architecture, name: str, tensor: Tensor) -> Tensor:
    mesh = architecture.mesh
    if name in architecture.REPLICATED or mesh.latent_parts == 1:
        return tensor
    return tensor.chunk(mesh.latent_parts)[mesh.latent_part].clone()


def unshard(shard: Architecture, template: Architecture) -> Architecture:
    """Assemble the whole architecture from the shards of all processes, in `template`, an architecture of the same
    config.
    """
    mesh, state = shard.mesh, shard.state_dict()
    replicated = state.keys() if mesh.latent_parts == 1 else shard.REPLICATED
    template.load_state_dict(
        {n: t if n in replicated else torch.cat(mesh.latent_all_gather(t)) for n, t in state.items()}
    )
    return template
