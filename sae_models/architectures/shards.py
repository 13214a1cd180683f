"""An architecture whose latents are shared out among processes."""

import torch
from torch import Tensor

from rudder.sae_models.architectures.architecture import Architecture
from rudder.sae_models.errors import UserError
from rudder.sae_models.sparse.collectives import Mesh


def sharded(architecture: Architecture, mesh: Mesh) -> Architecture:
    """The architecture with this process's part of the latents alone, in place. ValueError: they cannot be shared."""
    architecture.mesh = mesh
    if architecture.config.latents % mesh.latent_parts:
        raise UserError(f"latent_ranks: {mesh.latent_parts} does not divide the {architecture.config.latents} latents")
    for name, parameter in architecture.named_parameters():
        parameter.data = _part(architecture, name, parameter.data)
    for name, buffer in list(architecture.named_buffers()):
        setattr(architecture, name, _part(architecture, name, buffer))
    return architecture


def _part(architecture: Architecture, name: str, tensor: Tensor) -> Tensor:
    mesh = architecture.mesh
    if name in architecture.SHARED or mesh.latent_parts == 1:
        return tensor
    return tensor.chunk(mesh.latent_parts)[mesh.latent_part].clone()


def whole(part: Architecture, template: Architecture) -> Architecture:
    """The architecture of which every process holds a part, in `template`: one that was made with the same config."""
    mesh, state = part.mesh, part.state_dict()
    kept = state.keys() if mesh.latent_parts == 1 else part.SHARED
    template.load_state_dict({n: t if n in kept else torch.cat(mesh.gathered(t)) for n, t in state.items()})
    return template
