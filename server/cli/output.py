"""Consoles and tables of the commands."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rudder_client import Chunk, Inspection, PooledActivation, ResolvedTopic

POOLED_ROWS, ATTESTED_EDITS, TOPIC_ROWS = 10, 8, 4

# In a pipe, tables are not cut to the width of a terminal.
out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def print_error(error: Exception) -> None:
    """Print an error in one line on stderr; a refused request adds a line for each further field at fault."""
    err.print(f"[bold red]rudder:[/] {escape(' '.join(str(error).split()))}")
    for violation in getattr(error, "violations", ())[1:]:
        err.print(f"        {escape(violation.field)}: {escape(violation.description)}")


def optional(message: Any, field: str, form: str) -> str:
    """Format a field of a message; a dash where it is not set."""
    return form.format(getattr(message, field)) if message.HasField(field) else "-"


def print_end_of_choice(chunk: Chunk) -> None:
    """Print refusal, usage, pooled features and attestation of the last chunk of a choice on stderr."""
    if refusal := chunk.refusal:
        text = f": {refusal.text}" if refusal.text else ""
        err.print(f"[bold red]Refused by policy {escape(refusal.policy)}{escape(text)}[/]")
        err.print(f"[dim]rule {escape(refusal.rule)} held at token {refusal.position}[/]")
    if chunk.pooled:
        err.print(pooled_table(chunk.pooled))
    if chunk.usage:
        tokens = f"{chunk.usage.prompt_tokens} + {chunk.usage.generated_tokens} tokens"
        err.print(f"[dim]{tokens}, finish reason {chunk.finish_reason}[/]")
    print_verdicts(chunk)
    if chunk.attestation and chunk.attestation.topic:
        print_topic(chunk.attestation.topic)
    edits = chunk.attestation.edits if chunk.attestation else ()
    effective = [edit for edit in edits if edit.tokens_touched or edit.tokens_rejected]
    for edit in effective[:ATTESTED_EDITS]:
        rejected = f", [red]rejected at {edit.tokens_rejected}[/]" if edit.tokens_rejected else ""
        touched = f"touched {edit.tokens_touched} tokens{rejected}"
        err.print(f"[dim]{edit.site}: {escape(edit.row)}: {edit.operation} {touched}[/]")
    if len(effective) > ATTESTED_EDITS:
        err.print(f"[dim]and {len(effective) - ATTESTED_EDITS} more edits[/]")
    if idle := len(edits) - len(effective):
        err.print(f"[dim]{idle} of {len(edits)} edits touched [red]no token[/][/]")


def print_verdicts(chunk: Chunk) -> None:
    """Print the guards that held and let the choice go on."""
    for policy in chunk.attestation.policies if chunk.attestation else ():
        shadow = " (shadow)" if policy.shadow else ""
        if policy.withheld:
            err.print(f"[dim]{escape(policy.name)}: what it did is for readers of guards[/]")
        for verdict in policy.verdicts:
            if not (chunk.refusal and (policy.name, verdict.rule) == (chunk.refusal.policy, chunk.refusal.rule)):
                rule = escape(f"{policy.name}{shadow}: rule {verdict.rule}")
                err.print(f"[dim]{rule} held at token {verdict.position}[/]")


def print_topic(topic: ResolvedTopic) -> None:
    """Print what a topic stood for on stderr: rows and dose of the candidate that ran, and the one that came second."""
    dose = f"strength {topic.strength:.2f}, {topic.dose:.3f} residual norms, {topic.kl:.2f} nats per token"
    err.print(f"[dim]topic {escape(topic.concept)}: {dose}[/]")
    for mark, candidate in (("ran", topic.chosen), ("runner-up", topic.runner_up)):
        if candidate:
            rows = ", ".join(f"{row.index} ({escape(row.label) or 'no label'})" for row in candidate.rows[:TOPIC_ROWS])
            more = f" and {len(candidate.rows) - TOPIC_ROWS} more" if len(candidate.rows) > TOPIC_ROWS else ""
            err.print(f"[dim]{mark}: {candidate.kind}, score {candidate.score:.3f}: {rows}{more}[/]")


def inspection_table(inspection: Inspection, top: int) -> Table:
    """Build the table of tokens with their strongest features."""
    table = Table("", "token", *(f"feature {i + 1}" for i in range(top)))
    for token in inspection.tokens:
        strongest = token.activations[:top]
        cells = (f"{a.value:5.2f}  {a.feature.index} [dim]{escape(a.feature.label)}[/]" for a in strongest)
        table.add_row(str(token.position), escape(repr(token.text)), *cells)
    return table


def pooled_table(pooled: Sequence[PooledActivation]) -> Table:
    """Build the table of the strongest features over a text."""
    table = Table("feature", "sum", "maximum", "active tokens", "label")
    for p in pooled[:POOLED_ROWS]:
        figures = (f"{p.sum:.1f}", f"{p.max:.2f}", f"{p.active_tokens} of {p.tokens}")
        table.add_row(str(p.feature.index), *figures, escape(p.feature.label))
    return table
