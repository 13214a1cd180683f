"""The `rudder` command."""

import argparse
import importlib
import subprocess
import sys
import tempfile
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rudder import server
from rudder.server import config as configuration
from rudder.server.cli.bundle import add_bundle
from rudder.server.config import ConfigError
from rudder.server.process import free_port, require_free, stop, wait_serving
from rudder_client import Chunk, Client, Inspection, PooledActivation, Report, RudderError
from rudder_client.requests import Steer

BENCHES = {"engine": "Rudder against plain vLLM", "train": "the trainer against other SAE libraries"}


LOG_TAIL_LINES = 120
SAMPLING = {
    "max_tokens": (int, "tokens to generate at most"),
    "temperature": (float, "0: the likeliest token each time"),
    "top_p": (float, "choose among the likeliest tokens that make up this share"),
    "top_k": (int, "choose among this many tokens"),
    "seed": (int, "of the random choice"),
    "n": (int, "answers to generate"),
}

# Tables in a pipe are not cut to the width of a terminal that is not there.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    commands = parser()
    args, rest = commands.parse_known_args(argv)
    if rest and not args.takes_rest:
        commands.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        status: int = args.run(args) or 0
    except (ConfigError, RudderError, OSError, ValueError) as error:
        err.print(f"[bold red]rudder:[/] {escape(str(error))}")
        for violation in getattr(error, "violations", ())[1:]:
            err.print(f"        {escape(violation.field)}: {escape(violation.description)}")
        status = 1
    except KeyboardInterrupt:
        status = 130
    return status


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    top = argparse.ArgumentParser(prog="rudder", description="Steer, watch and unlearn inside a vLLM engine.")
    top.set_defaults(takes_rest=False)
    top.add_argument("--version", action="version", version=server.__version__)
    commands = top.add_subparsers(required=True, metavar="command")
    add_configured(commands, "serve", "start a server and stay", run_serve)
    config = commands.add_parser("config", help="the configuration").add_subparsers(required=True, metavar="command")
    add_configured(config, "show", "print the whole configuration, as a file that --config reads", run_config_show)
    generate = add_asking(commands, "generate", "answer a prompt, token by token", run_generate)
    generate.add_argument("--chat", action="store_true", help="send the prompt as a user's message of a chat")
    for name, (kind, text) in SAMPLING.items():
        generate.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    generate.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")
    generate.add_argument("--top-features", type=int, default=0, help="show this many of the strongest features")
    inspect = add_asking(commands, "inspect", "show the features of each token of a text", run_inspect)
    inspect.add_argument("--top", type=int, default=3, help="features per token (3)")
    features = add_client(commands, "features", "look features up", run_features)
    features.add_argument("index", nargs="?", type=int, help="one feature, with the texts it is active on")
    features.add_argument("--search", metavar="WORDS", help="by words of the label")
    features.add_argument("--by-meaning", action="store_true", help="search by what labels mean, not by their words")
    features.add_argument("--bundle", default="", help="which bundle; needed where several are served")
    features.add_argument("--limit", type=int, default=20, help="how many (20)")
    add_client(commands, "model", "show what is served: model, sites, bundles, programs, limits", run_model)
    add_bundle(commands)
    add_forwarded(commands, "train", "train SAEs as a file says", "rudder.server.cli.train")
    sae = commands.add_parser("sae", help="SAEs among each other").add_subparsers(required=True, metavar="command")
    add_forwarded(sae, "compare", "match the latents of two bundles", "rudder.sae_models.analysis.compare")
    bench = commands.add_parser("bench", help="measure").add_subparsers(required=True, metavar="benchmark")
    for name, text in BENCHES.items():
        add_bench(bench, name, text)
    commands.add_parser("demo", help="start a server, take the tour of it, stop it").set_defaults(run=run_demo)
    return top


def add_configured(commands: Any, name: str, text: str, run: Any) -> None:
    """A command that takes the configuration: a file, and each field as a flag."""
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML file; flags take precedence")
    for flag in configuration.flags():
        default = "" if flag.default is MISSING else f" ({configuration.plain(flag.default)})"
        command.add_argument(f"--{flag.name}", metavar="…", help=f"{flag.help}{default}".replace("%", "%%"))


def add_client(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    """A command that asks a server."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("--address", default="localhost:50051", help="of the server (localhost:50051)")
    return command


def add_asking(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    """A command that sends a text, and maybe a program."""
    command = add_client(commands, name, text, run)
    command.add_argument("text", help="the prompt; -: from standard input")
    command.add_argument("--program", help="a program: the name of one of the server's, or a YAML file")
    return command


def add_bench(commands: Any, name: str, text: str) -> None:
    """A benchmark; its load's fields are flags, added when it is asked for, so that others start quickly."""
    command = commands.add_parser(name, help=text, add_help=False)
    command.set_defaults(run=lambda args: run_bench(name, args.rest), takes_rest=True)


def add_forwarded(commands: Any, name: str, text: str, module: str) -> None:
    """A command that a module's `main` reads for itself; the module is imported when it is asked for."""
    command = commands.add_parser(name, help=text, add_help=False)
    command.set_defaults(run=lambda args: importlib.import_module(module).main(args.rest), takes_rest=True)


def run_serve(args: argparse.Namespace) -> int:
    """`rudder serve`."""
    config = configured(args)
    require_free(config.listen.host, config.listen.port, "listen.port")
    require_free(config.listen.host, config.listen.metrics_port, "listen.metrics_port")

    import asyncio

    from rudder.server.serve import serve

    return asyncio.run(serve(config))


def run_config_show(args: argparse.Namespace) -> None:
    """`rudder config show`."""
    sys.stdout.write(configuration.show(configured(args)))


def configured(args: argparse.Namespace) -> configuration.Config:
    """The configuration of a command line."""
    given = {flag.name: getattr(args, flag.name) for flag in configuration.flags()}
    return configuration.load(args.config, {name: text for name, text in given.items() if text is not None})


def run_generate(args: argparse.Namespace) -> None:
    """`rudder generate`: answers appear as they come; of several, each when it is whole."""
    text = text_of(args)
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    report = Report(top_k=args.top_features, pooled=True, tokens=False) if args.top_features else None
    prompt: Any = [{"role": "user", "content": text}] if args.chat else text
    texts: dict[int, str] = {}
    with Client(args.address) as client:
        stream = client.generate(prompt, steer=program_of(args), report=report, stop=args.stop, **sampling)
        for chunk in stream:
            texts[chunk.choice] = texts.get(chunk.choice, "") + chunk.text
            if (args.n or 1) == 1:
                out.print(chunk.text, end="", markup=False, soft_wrap=True)
            elif chunk.finish_reason:
                out.rule(f"{chunk.choice}")
                out.print(texts[chunk.choice], markup=False)
            if chunk.finish_reason:
                out.print()
                tell_end(chunk)


def tell_end(chunk: Chunk) -> None:
    """What the last chunk of a choice says, to standard error."""
    if chunk.pooled:
        err.print(pooled_table(chunk.pooled))
    if chunk.usage:
        used = chunk.usage
        err.print(f"[dim]{used.prompt_tokens} + {used.generated_tokens} tokens, ended by {chunk.finish_reason}[/]")
    for edit in chunk.attestation.edits if chunk.attestation else ():
        touched = f"{edit.tokens_touched} tokens" if edit.tokens_touched else "[red]no token[/]"
        err.print(f"[dim]{edit.site}: {escape(edit.row)}: {edit.operation} touched {touched}[/]")


def run_inspect(args: argparse.Namespace) -> None:
    """`rudder inspect`."""
    report = Report(top_k=args.top, pooled=True)
    with Client(args.address) as client:
        inspection = client.inspect(text_of(args), steer=program_of(args), report=report)
    out.print(inspection_table(inspection, args.top))
    out.print(pooled_table(inspection.pooled))


def run_features(args: argparse.Namespace) -> None:
    """`rudder features`: one, by words, or the first."""
    with Client(args.address) as client:
        if args.index is not None:
            tell_feature(client, args.index, args.bundle)
            return
        if args.search:
            found: Iterable[Any] = client.search(
                args.search, bundle=args.bundle, limit=args.limit, by_meaning=args.by_meaning
            )
        else:
            found = (feature for _, feature in zip(range(args.limit), client.features(args.bundle), strict=False))
        table = Table("feature", "frequency", "maximum", "label")
        for f in found:
            frequency, maximum = known(f, "frequency", "{:.3%}"), known(f, "max_activation", "{:.2f}")
            table.add_row(str(f.index), frequency, maximum, escape(f.label))
        out.print(table)


def tell_feature(client: Client, index: int, bundle: str) -> None:
    """One feature in full."""
    detail = client.feature(index, bundle)
    summary = detail.summary
    out.print(f"[bold]{escape(summary.label)}[/]  feature {summary.index} of {summary.bundle}, {summary.site}")
    frequency, maximum = known(summary, "frequency", "{:.3%}"), known(summary, "max_activation", "{:.2f}")
    out.print(f"active on {frequency} of tokens, at most {maximum}", quantiles_in_words(detail))
    for what, words in (
        ("strongest on", detail.top_tokens),
        ("promotes", [word.token for word in detail.promoted]),
        ("suppresses", [word.token for word in detail.suppressed]),
    ):
        if words:
            out.print(f"{what} " + escape(", ".join(repr(word) for word in words)))
    table = Table("activation", "text", "from")
    for context in detail.contexts:
        text = f"{escape(context.before)}[bold reverse]{escape(context.token)}[/]{escape(context.after)}"
        table.add_row(f"{context.activation:.2f}", " ".join(text.splitlines()), escape(context.source))
    out.print(table)


def known(message: Any, field: str, form: str) -> str:
    """A field for people; a dash where nobody measured it."""
    return form.format(getattr(message, field)) if message.HasField(field) else "-"


def quantiles_in_words(detail: Any) -> str:
    """Quantiles of an activation, or nothing."""
    return "; ".join(f"{q.share:.0%} below {q.activation:.2f}" for q in detail.quantiles)


def run_model(args: argparse.Namespace) -> None:
    """`rudder model`."""
    with Client(args.address) as client:
        model, programs = client.model(), client.programs()
    out.print(f"[bold]{model.model}[/], {model.layers} layers of {model.hidden_size}, {model.max_model_len} tokens")
    out.print(f"server {model.server_version}, vLLM {model.engine_version}, engine {model.engine_epoch}")
    table = Table("bundle", "site", "latents", "L0", "FVU", "sha256")
    for b in model.bundles:
        figures = known(b, "l0", "{:.1f}"), known(b, "fvu", "{:.3f}")
        table.add_row(b.name, b.site, str(b.latents), *figures, b.sha256[:12])
    out.print(table)
    table = Table("program", "applies", "digest", "description")
    for p in programs:
        table.add_row(p.name, "always" if p.always else "when named", p.digest[:12], escape(p.description))
    out.print(table)
    table = Table("limit", "most")
    for field, value in model.limits.ListFields():
        table.add_row(field.name, str(value))
    out.print(table)


def run_bench(name: str, rest: Sequence[str]) -> int | None:
    """`rudder bench NAME`. The trainer's has flags of its own; `engine`: the fields of its `Load`."""
    if name == "train":
        from rudder.sae_models.bench import train

        return train.main(rest)
    module = importlib.import_module(f"rudder.server.bench.{name}")
    command = argparse.ArgumentParser(prog=f"rudder bench {name}", description=module.__doc__)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    kinds = typing.get_type_hints(module.Load)
    for field in fields(module.Load):
        kind, default = kinds[field.name], field.default
        flag, text = f"--{field.name.replace('_', '-')}", f"({configuration.plain(default)})"
        command.add_argument(flag, metavar="…", help=text, type=flag_of(kind, field.name))
    given = {name: value for name, value in vars(command.parse_args(rest)).items() if value is not None}
    output = given.pop("json", None)
    module.run(module.Load(**given), output)
    return None


def flag_of(kind: Any, name: str) -> Any:
    """Reads a flag's text as the configuration's flags are read."""
    return lambda text: configuration.build(kind, configuration.parse_flag(kind, text, name), name)


def run_demo(_: argparse.Namespace) -> int:
    """`rudder demo`: nothing is left running, whatever happens."""
    port, metrics_port = free_port(), free_port()
    ports = ["--listen.port", str(port), "--listen.metrics_port", str(metrics_port)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rudder.server", "serve", *ports], stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_serving(process, f"127.0.0.1:{port}")
            tour = [
                sys.executable,
                "-m",
                "rudder_client.tour",
                f"127.0.0.1:{port}",
                f"http://127.0.0.1:{metrics_port}/metrics",
            ]
            status = subprocess.run(tour, check=False).returncode
        except RudderError as error:
            err.print(f"[bold red]the server did not come up:[/] {escape(str(error))}")
            status = 1
        finally:
            stop(process)
        if status:
            tell_tail(log)
    return status


def tell_tail(log: IO[str]) -> None:
    """The end of a server's log."""
    log.seek(0)
    err.rule("the end of the server's log")
    err.print("".join(log.readlines()[-LOG_TAIL_LINES:]), markup=False)


def text_of(args: argparse.Namespace) -> str:
    """The text of a command line, or standard input's."""
    text: str = sys.stdin.read() if args.text == "-" else args.text
    return text


def program_of(args: argparse.Namespace) -> Steer:
    """The program of a command line: a file's, or the name of one of the server's."""
    if args.program and Path(args.program).suffix in (".yaml", ".yml"):
        from rudder.server.program.named import read_program

        return read_program(Path(args.program))
    return args.program or None


def inspection_table(inspection: Inspection, top: int) -> Table:
    """Each token with its strongest features."""
    table = Table("", "token", *(f"feature {i + 1}" for i in range(top)))
    for token in inspection.tokens:
        strongest = token.activations[:top]
        cells = (f"{a.value:5.2f}  {a.feature.index} [dim]{escape(a.feature.label)}[/]" for a in strongest)
        table.add_row(str(token.position), escape(repr(token.text)), *cells)
    return table


def pooled_table(pooled: Sequence[PooledActivation], most: int = 10) -> Table:
    """The strongest features over a whole text."""
    table = Table("feature", "sum", "maximum", "active tokens", "label")
    for p in pooled[:most]:
        row = (str(p.feature.index), f"{p.sum:.1f}", f"{p.max:.2f}", f"{p.active_tokens} of {p.tokens}")
        table.add_row(*row, escape(p.feature.label))
    return table
