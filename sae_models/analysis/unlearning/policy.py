"""A policy from a study's method: trained rows as a bundle, a gate and a guard, and a report to read.

The policy is message Policy of proto/rudder/v1/policy.proto in its JSON form. A guard judges the prompt: where it
alarms, the prompt runs again with the gate open from its start. The program's gate has the same statistic, for answers
that come to the topic later.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rudder.sae_models.analysis.program import share_probes
from rudder.sae_models.analysis.unlearning.gate import texts_of
from rudder.sae_models.analysis.unlearning.methods import LATENTS, Fitted
from rudder.sae_models.analysis.unlearning.steering import AlarmGate
from rudder.sae_models.bundle import bundle, catalogue
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.bundle.manifest import Training
from rudder.sae_models.evaluation import activity
from rudder.sae_models.sae import SAE, Rows

DECIMALS = 4
CONFORMANCE_TOKENS = 128
# A latent is one of a format if more than this share of its tokens are punctuation or the first of a text.
FIRST_TOKENS, FORMATTING = 4, 0.5
CREDIT = "rows trained on the text of the corpus that the policy was derived from"
DESCRIPTION = """\
Makes {topic} inaccessible through this server where a text is about it; the model's weights still hold it. A linear \
detector judges the mean of the last {window} tokens; {rows} rows, trained so that the model answers like one that \
never read {topic}, then move the residual stream at every token."""


@dataclass(frozen=True)
class Derived:
    """A fitted rotation, the dose of its trained rows, and the bundle that holds them."""

    fitted: Fitted
    dose: float
    rows: Bundle

    @property
    def gate(self) -> AlarmGate:
        """The gate, with weights as the policy's file has them."""
        return self.fitted.gate


def write_rows(folder: Path, rows: Rows, fitted: Fitted, model: bundle.Model) -> Bundle:
    """Write trained rows as a bundle of their own; statistics are of the texts that they were trained on."""
    sae = SAE(rows.encoder, rows.bias, rows.threshold, rows.decoder, torch.zeros(rows.decoder.shape[1]))
    x = torch.cat([fitted.forget, fitted.retain])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    sums = activity.activity(sae, x)
    site = str(fitted.material.rig.site)
    content = bundle.describe(
        sae,
        name=folder.name,
        model=model,
        sites=(site,),
        output_site="",
        architecture="learned",
        training=Training(tokens=len(x), seed=fitted.select, credit=CREDIT),
    )
    with tempfile.TemporaryDirectory() as scratch:
        database = Path(scratch) / bundle.CATALOGUE
        catalogue.write(database, activity.unlabelled(sums))
        vectors = bundle.conformance_of(sae, x[order[:CONFORMANCE_TOKENS]])
        return bundle.write(
            folder, content, sae, activity.statistics_of(sums), vectors, database, bundle.Form(compressed=True)
        )


def policy_of(derived: Derived, name: str, version: int = 1) -> dict[str, Any]:
    """Return a policy that binds everybody."""
    gate, site = derived.gate, str(derived.fitted.material.rig.site)
    topic = ", ".join(derived.fitted.material.split.topic.books)
    weights = [float(f"{weight:.6g}") for weight in gate.detector.weights.tolist()]
    probe = {"probe": {"name": f"{name}-detector", "weights": weights, "bias": float(f"{gate.detector.bias:.6g}")}}
    statistic = {"window": {"tokens": gate.window}, "level": round(gate.level, 2), "min_tokens": gate.min_tokens}
    rows = derived.rows.manifest
    edits = [
        {"row": {"feature": {"bundle": rows.name, "index": index}}, "scale": round(1 + derived.dose, DECIMALS)}
        for index in range(rows.latents)
    ]
    guard = {
        "name": "topic-in-prompt",
        "score": {"terms": [{"site": site, "row": probe, "weight": 1.0}]},
        **statistic,
        "phase": "PHASE_PROMPT",
        "action": "GUARD_ACTION_CLAMP_FROM_START",
    }
    return {
        "name": name,
        "description": DESCRIPTION.format(topic=topic, window=gate.window, rows=rows.latents),
        "version": version,
        "mode": "POLICY_MODE_ENFORCE",
        "binds": {"all": True},
        "bundles": {rows.name: derived.rows.sha256},
        "program": {
            "name": name,
            "sites": [{"site": site, "edits": edits}],
            "gate": {"site": site, "sequence": {"score": probe, **statistic, "latch": True}},
        },
        "guards": [guard],
    }


def write_policy(path: Path, policy: dict[str, Any]) -> None:
    """Write a policy to a YAML file; equal probes stand there once."""
    text = yaml.safe_dump(share_probes(policy), sort_keys=False, width=110, default_flow_style=None, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def formatting_share(fitted: Fitted, latents: list[int]) -> Tensor:
    """Return the share of the tokens at which each latent is active on the topic that are its format: the first
    FIRST_TOKENS of a text, and tokens without a letter or digit [n].
    """
    tokenizer = fitted.material.rig.tokenizer
    active, formal = torch.zeros(len(latents)), torch.zeros(len(latents))
    for texts in texts_of(fitted.material, [fitted.select], fitted.material.split.topic.books):
        tokens = texts.windows.tokens
        # Of a corpus without definitions, the second of the texts are none.
        plain = torch.tensor(
            [not any(map(str.isalnum, tokenizer.decode([token]))) for token in tokens.flatten().tolist()],
            dtype=torch.bool,
        )
        form = plain.view_as(tokens) | (torch.arange(tokens.shape[1]) <= FIRST_TOKENS)
        f = fitted.material.rig.bundle.sae.encode(texts.x[texts.windows.counted])[:, latents] > 0
        active += f.sum(0)
        formal += (f & form[texts.windows.counted][:, None]).sum(0)
    return formal / active.clamp(min=1)


def latents_table(fitted: Fitted) -> list[str]:
    """Return a Markdown table of the topic's latents, by CRISP's rule, with a warning where one is of a format."""
    latents = fitted.latents("crisp", LATENTS)
    a, shares, entries = fitted.activities, formatting_share(fitted, latents), fitted.material.rig.bundle.catalogue
    lines = [
        "| latent | label | topic | retained | neighbour | format | example |",
        "|---|---|---|---|---|---|---|",
    ]
    for latent, share in zip(latents, shares.tolist(), strict=True):
        entry = entries.get(latent)
        examples = [f"{c.before[-30:]}**{c.token.strip()}**{c.after[:20]}" for c in entry.contexts[:1]]
        figures = (a.forget.frequency[latent], a.retain.frequency[latent], a.near[latent])
        warning = " (format)" if share > FORMATTING else ""
        cells = [str(latent), entry.summary.label, *(f"{figure:.2%}" for figure in figures), f"{share:.0%}{warning}"]
        lines.append("| " + " | ".join(escape(cell) for cell in (*cells, *examples)) + " |")
    return lines


def escape(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


REPORT = """\
# Policy {name}

Makes **{topic}** inaccessible through this server, and spares {neighbours} as far as its gate can tell them apart.
The model's weights still hold the topic: whoever has them, or runs them without this server, has it.

- *Gate*: the mean score of the last {window} tokens is above {level:.2f}, after {min_tokens} tokens. The level was set
  on sections that the detector was not fitted on.
- *Edit*: {rows} trained rows, dose {dose:.2f}, bundle `{bundle}` ({sha256:.12}).
- Figures are of sections that neither the rows nor the level were fitted on, with 95 % intervals over sections.

## What it reaches

{figures}

## By book

{books}

## How the topic is recognised

Latents of the topic: at least three times as frequent there as on any neighbour. Shares are of the tokens at which each
is active; `format`: of those on the topic, how many are punctuation or the first tokens of a text. A latent that is
mostly of a format says how a text is written, and not what it is about.

{latents}
"""


def markdown(derived: Derived, name: str, figures: list[str], books: list[str]) -> str:
    """Return the report of a policy: what it does, what it costs, and by which latents its topic is recognised."""
    gate, topic, rows = derived.gate, derived.fitted.material.split.topic, derived.rows
    return REPORT.format(
        name=name,
        topic=", ".join(topic.books),
        neighbours=", ".join(topic.neighbours) or "all else",
        window=gate.window,
        level=gate.level,
        min_tokens=gate.min_tokens,
        rows=rows.manifest.latents,
        dose=derived.dose,
        bundle=rows.manifest.name,
        sha256=rows.sha256,
        figures="\n".join(figures),
        books="\n".join(books),
        latents="\n".join(latents_table(derived.fitted)),
    )
