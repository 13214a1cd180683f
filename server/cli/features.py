"""`rudder features`: look up features in the catalogues of a server."""

from collections.abc import Iterable, Sequence
from itertools import islice

from rich.markup import escape
from rich.table import Table

from rudder.server.cli.arguments import add_address, command, connect, integer, utf8
from rudder.server.cli.output import optional, out
from rudder.v1 import catalogue_pb2

EXAMPLES = """\
examples:
  rudder features --limit 50
  rudder features --search star
  rudder features 12
"""


def main(argv: Sequence[str]) -> None:
    """Print one feature in full, those whose labels match a search, or the first of a bundle."""
    parser = command("features", "Look up features by index or label.", EXAMPLES)
    add_address(parser)
    parser.add_argument("index", nargs="?", type=integer(), help="index of one feature, to show with its contexts")
    parser.add_argument("--search", type=utf8, metavar="WORDS", help="list features by words of their label")
    parser.add_argument("--by-meaning", action="store_true", help="search by the meaning of labels, not by their words")
    parser.add_argument("--for-steering", action="store_true", help="order what a search finds by output score")
    parser.add_argument("--bundle", type=utf8, default="", help="bundle; a search without one is of all bundles")
    parser.add_argument("--limit", type=integer(), default=20, help="maximum number of features (%(default)s)")
    args = parser.parse_args(argv)
    with connect(args) as client:
        if args.index is not None:
            print_feature(client.feature(args.index, args.bundle))
        elif args.search:
            for name in [args.bundle] if args.bundle else [bundle.name for bundle in client.model().bundles] or [""]:
                ways = {"by_meaning": args.by_meaning, "for_steering": args.for_steering}
                matches = client.search(args.search, bundle=name, limit=args.limit, **ways)
                out.print(features_table(matches, name))
        else:
            out.print(features_table(islice(client.features(args.bundle), args.limit)))


def features_table(features: Iterable[catalogue_pb2.FeatureSummary], title: str | None = None) -> Table:
    """Build the table of features."""
    table = Table("feature", "frequency", "maximum", "score", "output", "label", title=title)
    for f in features:
        figures = optional(f, "frequency", "{:.3%}"), optional(f, "max_activation", "{:.2f}")
        scores = (optional(f, name, "{:.2f}") for name in ("label_score", "output_score"))
        table.add_row(str(f.index), *figures, *scores, label_of(f.label))
    return table


def label_of(label: str) -> str:
    """Return a label as markup."""
    return escape(label) if label else "[dim]no label[/]"


def score_line(summary: catalogue_pb2.FeatureSummary) -> str:
    """Say how well the label picks out contexts, what adding the feature does to its words, and who wrote it."""
    parts = [f"from {escape(summary.label_origin)}"] if summary.label_origin else []
    if summary.HasField("label_score"):
        best = "" if summary.label else "the best label "
        interval = f"{summary.label_score:.2f} ± {summary.label_error:.2f}"
        parts.append(f"{best}picks out held-out contexts with score {interval} (chance 0.5)")
    if summary.HasField("intervention"):
        parts.append(f"adding it raises the label's words above {summary.intervention:.0%} of the vocabulary")
    if summary.HasField("output_score"):
        parts.append(
            f"output score {summary.output_score:.2f}, input score {optional(summary, 'input_score', '{:.2f}')}"
        )
    return "; ".join(parts)


def print_feature(detail: catalogue_pb2.FeatureDetail) -> None:
    """Print label, statistics, tokens and contexts of a feature."""
    summary = detail.summary
    out.print(f"[bold]{label_of(summary.label)}[/]  feature {summary.index} of {summary.bundle}, {summary.site}")
    if line := score_line(summary):
        out.print(line)
    frequency, maximum = optional(summary, "frequency", "{:.3%}"), optional(summary, "max_activation", "{:.2f}")
    quantiles = "; ".join(f"{q.share:.0%} below {q.activation:.2f}" for q in detail.quantiles)
    out.print(f"active on {frequency} of tokens, maximum {maximum}", quantiles)
    for title, tokens in (
        ("strongest on", detail.top_tokens),
        ("promotes", [token.token for token in detail.promoted]),
        ("suppresses", [token.token for token in detail.suppressed]),
    ):
        if tokens:
            out.print(f"{title} " + escape(", ".join(repr(token) for token in tokens)))
    for near in detail.neighbours:
        out.print(f"near feature {near.index}, cosine {near.cosine:.2f}: {label_of(near.label)}")
    table = Table("activation", "text", "from", "")
    for context in detail.contexts:
        text = f"{escape(context.before)}[bold]«{escape(context.token)}»[/]{escape(context.after)}"
        chosen = "held out" if context.held_out else "strongest"
        table.add_row(f"{context.activation:.2f}", " ".join(text.splitlines()), escape(context.source), chosen)
    out.print(table)
