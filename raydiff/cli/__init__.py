"""The `raydiff` command: one click command per file, loaded when it is called."""

import sys
from importlib import import_module
from typing import Any

import click

from raydiff import __version__
from raydiff.errors import InputError, RaydiffError, nearest

COMMANDS = {
    "render": ("raydiff.cli.render", "Render a manifest, a job file or single prompts."),
    "plan": ("raydiff.cli.plan", "Say what a run would do, without rendering."),
    "sweep": ("raydiff.cli.sweep", "Make a manifest: prompts times settings, templates, seeds."),
    "status": ("raydiff.cli.status", "Show how far a run is."),
    "verify": ("raydiff.cli.verify", "Check every file of a run against its metadata."),
    "retry-failed": ("raydiff.cli.retry_failed", "Render the failed rows of a run again."),
    "reproduce": ("raydiff.cli.reproduce", "Render one image again from its metadata."),
    "sheet": ("raydiff.cli.sheet", "Make labelled contact sheets of a run."),
    "query": ("raydiff.cli.query", "Ask a run's metadata in SQL."),
    "gallery": ("raydiff.cli.gallery", "Write a page to look through a run's results."),
    "export": ("raydiff.cli.export", "Write a run as a dataset: WebDataset, ImageFolder, Parquet."),
    "diff": ("raydiff.cli.diff", "Compare two runs: max abs, PSNR, SSIM per request."),
    "score": ("raydiff.cli.score", "Score a run's images with a function of your own."),
    "encode": ("raydiff.cli.encode", "Encode a manifest's texts ahead of its run."),
    "encode-server": ("raydiff.cli.encode_server", "Encode texts for workers elsewhere."),
    "models": ("raydiff.cli.models", "Inspect, download or make checkpoints."),
    "doctor": ("raydiff.cli.doctor", "Check this machine: Python, torch, GPUs, Ray, disk."),
    "mini": ("raydiff.cli.mini", "Train the miniature models, or draw what they learn from."),
    "bench": ("raydiff.cli.bench", "Measure the engine and the models on this machine."),
    "completion": ("raydiff.cli.completion", "Make bash, zsh or fish complete this command."),
}

START = """raydiff renders a Parquet manifest of prompts into images on every GPU there is.

Try it without a download; a miniature model draws coloured shapes:
  raydiff render --prompt "two red circles left of a blue square" --model mini-sd21 --out shapes
  raydiff sheet shapes

A first picture; the model is fetched from the Hub:
  raydiff render --prompt "a lighthouse at dusk" --model sdxl --out first

A manifest, a Parquet file with a column `prompt`:
  raydiff plan prompts.parquet --model sdxl
  raydiff render prompts.parquet --model sdxl --out renders

All commands: raydiff --help. One of them: raydiff render --help. This machine: raydiff doctor."""


class LazyGroup(click.Group):
    """A group that knows its commands' names and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order a newcomer needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), cmd_name.replace("-", "_"))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called; name the nearest one where there is none."""
        if args[0] not in COMMANDS and args[0][:1].isalpha():
            hint = nearest(args[0], COMMANDS) or "raydiff --help lists them."
            ctx.fail(f"no command {args[0]!r}: {hint.strip()}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Turn raydiff's own errors into one message and an exit status."""
        try:
            return super().invoke(ctx)
        except RaydiffError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2 if isinstance(error, InputError) else 1)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="raydiff")
@click.pass_context
def main(context: click.Context) -> None:
    """Render a Parquet manifest of prompts into images on every GPU there is.

    \b
    raydiff render --prompt "a lighthouse at dusk" --model sdxl
    raydiff render prompts.parquet --model sdxl --out renders
    raydiff status renders
    """
    if context.invoked_subcommand is None:
        click.echo(START)
