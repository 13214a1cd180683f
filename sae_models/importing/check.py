"""Everything that can be verified of a bundle, each finding by its field; nothing stops at the first that is wrong."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from rudder.sae_models import fidelity
from rudder.sae_models.activations import samples as materials
from rudder.sae_models.bundle import bundle
from rudder.sae_models.bundle.bundle import Bundle, BundleError
from rudder.sae_models.bundle.manifest import Manifest
from rudder.sae_models.importing import importer as importing
from rudder.sae_models.importing.convention import Verdict

TOKENS = 20_000

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One thing looked at, whether it holds, and what was seen."""

    field: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """Of one bundle; `verdict` where text and model were given."""

    name: str
    findings: tuple[Finding, ...]
    verdict: Verdict | None

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.holds for finding in self.findings)


def check(path: Path, model: Path | None = None, corpus: Path | None = None) -> Report:
    """Of the bundle in a folder; the model's folder and text are what it is compared with."""
    findings: list[Finding] = []
    parsed = _tried(findings, bundle.MANIFEST, "read", lambda: bundle.read_manifest(path))
    if parsed is None:
        return Report(path.name, tuple(findings), None)
    content, sha256 = parsed
    _tried(findings, "files", f"{len(content.files)} hashes agree", lambda: bundle.check_files(path, content))
    opened = _tried(findings, "tensors", shapes(content), lambda: bundle.mapped(path))
    verdict = None
    if opened is not None:
        findings += contents(opened)
        if model is not None:
            findings.append(fits_model(opened, model))
            if corpus is not None:
                found, verdict = on_text(opened, model, corpus)
                findings += found
        opened.catalogue.close()
    return Report(f"{content.name} {sha256[:12]}", tuple(findings), verdict)


def shapes(content: Manifest) -> str:
    """Of the matrices, in words."""
    return f"encoder {content.latents} x {content.d}, decoder {content.latents} x {content.d_out}, {content.dtype}"


def contents(opened: Bundle) -> Iterator[Finding]:
    """What can be told without the model."""
    latents = opened.manifest.latents
    steps: tuple[tuple[str, str, Callable[[Bundle], None]], ...] = (
        ("values", "all finite", bundle.check_values),
        ("conformance", f"{len(opened.conformance.activations)} tokens reproduce", bundle.check_conformance),
        ("catalogue", f"{latents} latents", bundle.check_catalogue),
    )
    for field, detail, step in steps:
        found: list[Finding] = []
        _tried(found, field, detail, partial(step, opened))
        yield from found


def fits_model(opened: Bundle, model: Path) -> Finding:
    """Whether the folder holds the checkpoint that the bundle was made for."""
    found: list[Finding] = []
    width = materials.read_model_shape(model).hidden_size
    sha256 = bundle.model_sha256(model)
    _tried(found, "model", f"{model} is it", lambda: bundle.check_model(opened, sha256, width))
    return found[0]


def on_text(opened: Bundle, model: Path, corpus: Path) -> tuple[list[Finding], Verdict | None]:
    """L0 and FVU on text against what the manifest claims, and which convention fits best."""
    content = opened.manifest
    _, at, verdict = importing.figures(opened.sae, content, model, corpus, TOKENS)
    measured = fidelity.measured(opened.sae, *importing.inputs_and_target(content, at))
    claims = importing.claims_of(content)
    findings = []
    fvu = (("fvu", measured.fvu, claims.fvu),) if measured.compared else ()
    for field, value, claimed in (("l0", measured.l0, claims.l0), *fvu):
        said = "nothing claimed" if claimed is None else f"{claimed:.4g} claimed"
        findings.append(Finding(field, bundle.near(value, claimed), f"{value:.4g} on {measured.tokens} tokens, {said}"))
    if verdict:
        stands = "as declared" if verdict.stands else importing.advice(verdict)
        findings.append(Finding("convention", verdict.stands, stands))
    return findings, verdict


def _tried(findings: list[Finding], field: str, detail: str, step: Callable[[], T]) -> T | None:
    try:
        value = step()
    except BundleError as error:
        findings.append(Finding(field, False, str(error)))
        return None
    findings.append(Finding(field, True, detail))
    return value
