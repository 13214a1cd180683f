"""Run every check on a bundle and report each by its field; a failed check does not stop the others."""

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
from rudder.sae_models.importing.convention import Comparison

TOKENS = 20_000

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The result of one check: the field, whether it holds, and the detail."""

    field: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """The findings on one bundle. `verdict`: the comparison of conventions, with a model and a corpus only."""

    name: str
    findings: tuple[Finding, ...]
    verdict: Comparison | None

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(finding.holds for finding in self.findings)


def check_bundle(path: Path, model: Path | None = None, corpus: Path | None = None) -> Report:
    """Check the bundle in a folder; with its model's folder also the fit, and with a corpus also the figures."""
    findings: list[Finding] = []
    parsed = _attempt(findings, bundle.MANIFEST, "read", lambda: bundle.read_manifest(path))
    if parsed is None:
        return Report(path.name, tuple(findings), None)
    content, sha256 = parsed
    _attempt(findings, "files", f"{len(content.files)} hashes agree", lambda: bundle.check_files(path, content))
    opened = _attempt(findings, "tensors", describe_shapes(content), lambda: bundle.open_unverified(path))
    verdict = None
    if opened is not None:
        findings += check_contents(opened)
        if model is not None:
            findings.append(check_fit(opened, model))
            if corpus is not None:
                figures, verdict = check_figures(opened, model, corpus)
                findings += figures
        opened.catalogue.close()
    return Report(f"{content.name} {sha256[:12]}", tuple(findings), verdict)


def describe_shapes(content: Manifest) -> str:
    """Format the shapes and dtype of the matrices."""
    return f"encoder {content.latents} x {content.d}, decoder {content.latents} x {content.d_out}, {content.dtype}"


def check_contents(opened: Bundle) -> Iterator[Finding]:
    """Check what needs no model: values, conformance vectors, catalogue."""
    latents = opened.manifest.latents
    steps: tuple[tuple[str, str, Callable[[Bundle], None]], ...] = (
        ("values", "all finite", bundle.check_values),
        ("conformance", f"{len(opened.conformance.activations)} tokens reproduce", bundle.check_conformance),
        ("catalogue", f"{latents} latents", bundle.check_catalogue),
    )
    for field, detail, step in steps:
        findings: list[Finding] = []
        _attempt(findings, field, detail, partial(step, opened))
        yield from findings


def check_fit(opened: Bundle, model: Path) -> Finding:
    """Check that the folder holds the checkpoint that the bundle fits."""
    findings: list[Finding] = []
    width = materials.read_model_shape(model).hidden_size
    sha256 = bundle.model_sha256(model)
    _attempt(findings, "model", f"{model} is it", lambda: bundle.check_model(opened, sha256, width))
    return findings[0]


def check_figures(opened: Bundle, model: Path, corpus: Path) -> tuple[list[Finding], Comparison | None]:
    """Compare L0 and FVU on a corpus with the manifest's claims, and the declared convention with others."""
    content = opened.manifest
    _, vectors, verdict = importing.sample_and_compare(opened.sae, content, model, corpus, TOKENS)
    measured = fidelity.measure(opened.sae, *importing.inputs_and_target(content, vectors))
    claims = importing.claims_of(content)
    findings = []
    fvu = (("fvu", measured.fvu, claims.fvu),) if measured.compared else ()
    for field, value, claimed in (("l0", measured.l0, claims.l0), *fvu):
        claim = "nothing claimed" if claimed is None else f"{claimed:.4g} claimed"
        detail = f"{value:.4g} on {measured.tokens} tokens, {claim}"
        findings.append(Finding(field, bundle.confirms(value, claimed), detail))
    if verdict:
        detail = "as declared" if verdict.stands else importing.describe_mismatch(verdict)
        findings.append(Finding("convention", verdict.stands, detail))
    return findings, verdict


def _attempt(findings: list[Finding], field: str, detail: str, step: Callable[[], T]) -> T | None:
    try:
        value = step()
    except BundleError as error:
        findings.append(Finding(field, False, str(error)))
        return None
    findings.append(Finding(field, True, detail))
    return value
