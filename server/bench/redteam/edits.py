"""Programs of attackers."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rudder.server.bench.redteam import policies
from rudder.v1 import program_pb2

Floats = NDArray[np.float64]
ABSOLUTE, NORMS = program_pb2.UNIT_ABSOLUTE, program_pb2.UNIT_RESIDUAL_NORM
MAXIMA = program_pb2.UNIT_MAX_ACTIVATION


def program_at(site: str, *edits: program_pb2.Edit) -> program_pb2.Program:
    """Return a program of these edits at a site."""
    return program_pb2.Program(sites=[program_pb2.SiteEdits(site=site, edits=edits)])


def latent_edit(index: int, **operation: Any) -> program_pb2.Edit:
    """Return an edit of a latent."""
    feature = program_pb2.Feature(bundle=policies.BUNDLE, index=index)
    return program_pb2.Edit(row=program_pb2.Row(feature=feature), **operation)


def vector_edit(values: Floats, value: float = 1.0, unit: program_pb2.Unit = ABSOLUTE) -> program_pb2.Edit:
    """Return the edit that adds a vector."""
    vector = program_pb2.Vector(name="own", values=values.tolist())
    return program_pb2.Edit(row=program_pb2.Row(vector=vector), add=value, unit=unit)


def probe_direction() -> Floats:
    """Return the direction of the policy's probe, of length 1."""
    weights = np.array(policies.probe()["probe"]["weights"], np.float64)
    return np.asarray(weights / np.linalg.norm(weights))


def other_direction(seed: int) -> Floats:
    """Return a random direction, of length 1, that is orthogonal to the policy's probe."""
    other = np.random.default_rng(seed).normal(size=len(probe_direction()))
    other -= (other @ probe_direction()) * probe_direction()
    return np.asarray(other / np.linalg.norm(other))
