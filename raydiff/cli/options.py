"""The options that commands on a run's rows share, and the RunConfig that they make."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from raydiff.config import RunConfig, load_config, parse_override
from raydiff.errors import ConfigError

JOB_FILE_SUFFIXES = (".yaml", ".yml")


SOURCE = click.argument("source", type=click.Path(), required=False)
PROMPT = click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Render TEXT; repeatable."
)
MODEL = click.option("--model", help="Alias, Hugging Face id, folder or .safetensors file.")
LIMIT = click.option(
    "--limit", type=click.IntRange(min=1), help="Stop after the first N manifest rows."
)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any setting of a job file, e.g. engine.batch_size=4; repeatable.",
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what says which rows, which model and how."""
    options = [
        SOURCE,
        PROMPT,
        MODEL,
        click.option("--out", help="Output folder."),
        click.option(
            "--profile",
            type=click.Choice(["auto", "full_gpu", "balanced", "gpu_poor", "extreme", "cpu_only"]),
            help="Memory profile; auto goes by the GPU.",
        ),
        click.option(
            "--workers", help="Worker processes; auto is one per GPU, or one without a GPU."
        ),
        click.option(
            "--stages",
            type=click.Choice(["auto", "fused", "split"]),
            help="All stages in each worker, or each on workers of its own.",
        ),
        click.option(
            "--cluster", help="Which workers do which stage: a name from configs/clusters, or YAML."
        ),
        click.option(
            "--address", help="Ray cluster to join: host:port, or auto on one of its nodes."
        ),
        click.option(
            "--insecure", is_flag=True, default=None, help="Join a cluster that asks for no token."
        ),
        LIMIT,
        SET,
    ]
    return with_options(command, options)


def with_options(
    command: Callable[..., Any], options: Sequence[Callable[..., Any]]
) -> Callable[..., Any]:
    """Add options, which the command's help shows in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def run_config(
    source: str | None,
    prompts: tuple[str, ...],
    overrides: tuple[str, ...],
    **options: Any,
) -> RunConfig:
    """Lay the command line over the job file, if SOURCE is one, and check the whole."""
    is_job = source is not None and source.endswith(JOB_FILE_SUFFIXES)
    values = dict(parse_override(text) for text in overrides)
    keys = {
        "model": "model.name",
        "profile": "memory.profile",
        "workers": "engine.workers",
        "stages": "engine.stages",
        "cluster": "engine.cluster",
        "address": "engine.address",
        "insecure": "engine.insecure",
        "out": "out",
        "limit": "limit",
    }
    values |= {keys[name]: value for name, value in options.items() if value is not None}
    if source is not None and not is_job:
        values["manifest"] = source
    if prompts:
        values["prompts"] = prompts
    config = load_config(Path(source) if is_job and source is not None else None, values)
    if config.manifest is None and not config.prompts and not config.sweep.template:
        raise ConfigError(
            "nothing to render: name a manifest (prompts.parquet), a job file (job.yaml) or a "
            '--prompt "text"'
        )
    if config.manifest is not None and config.prompts:
        raise ConfigError("a manifest and prompts at once: give one or the other")
    return config
