"""`raydiff encode-server`: a text encoder for workers that have none."""

import signal
from pathlib import Path

import click

from raydiff.config import load_config, parse_override
from raydiff.errors import ConfigError


@click.command("encode-server")
@click.option("--model", required=True, help="LTX-2: alias, Hugging Face id, folder or file.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="File with the token that clients must send.",
)
@click.option("--insecure", is_flag=True, help="Ask for no token; only on a loopback address.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of a job file's model or memory section; repeatable.",
)
def encode_server(
    model: str,
    host: str,
    port: int,
    token_file: Path | None,
    insecure: bool,
    overrides: tuple[str, ...],
) -> None:
    """Encode texts for LTX-2's workers elsewhere, with the model's text encoder on this machine.

    Those run with --set ltx2.text_encoder=api, with ltx2.encoder_url and ltx2.encoder_hosts, and
    with the token in their environment as RAYDIFF_ENCODER_TOKEN. It is plain HTTP: outside of your
    own network put a proxy with TLS before it. Ctrl-C or SIGTERM ends it at once.

    \b
    openssl rand -hex 32 > token
    raydiff encode-server --model Lightricks/LTX-2 --host 0.0.0.0 --token-file token
    raydiff encode-server --model Lightricks/LTX-2 --insecure
    """
    token = _token(token_file, insecure)
    values = dict(parse_override(text) for text in overrides)
    config = load_config(overrides=values | {"model.name": model})

    from raydiff.pipelines.encoder_server import EncoderServer, serve_encoder

    with EncoderServer(host, port, token=token) as server:
        # It keeps nothing that would have to be put in order: a signal may end it anywhere.
        for ending in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ending, signal.SIG_DFL)
        serve_encoder(
            server,
            model=config.model,
            memory=config.memory,
            on_ready=lambda about: click.echo(
                f"{server.url} encodes for {about.model}, revision {about.revision}, {about.dtype}"
            ),
        )


def _token(token_file: Path | None, is_insecure: bool) -> str | None:
    """Return the token, None where none is asked for."""
    if (token_file is None) is not is_insecure:
        raise click.UsageError("give --token-file FILE or --insecure: one of them, not both")
    if token_file is None:
        return None
    try:
        return token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {token_file}: cannot be read: {error}") from None
