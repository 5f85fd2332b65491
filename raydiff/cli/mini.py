"""`raydiff mini`: draw the miniatures' training scenes, and train miniatures."""

from typing import Any

import click


@click.group()
def mini() -> None:
    """Make the miniature models that ship with raydiff, or ones of your own.

    \b
    raydiff mini draw scenes.png
    raydiff mini autoencoder --out my-autoencoder
    raydiff mini train --out my-models
    """


@mini.command()
@click.argument("path", type=click.Path())
@click.option("--scenes", default=64, show_default=True, help="How many, in rows of eight.")
@click.option("--seed", default=0, show_default=True)
def draw(path: str, scenes: int, seed: int) -> None:
    """Draw training scenes into the image file PATH and print their captions.

    \b
    raydiff mini draw scenes.png
    """
    from raydiff.mini.show import draw_scenes

    for text in draw_scenes(path, scenes, seed):
        click.echo(text)


_SCALE = click.option(
    "--scale",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 10, min_open=True),
    help="Share of the scenes and steps: less for a try, more for longer training.",
)


@mini.command()
@click.option("--out", required=True, type=click.Path(), help="New folder for it.")
@_SCALE
def autoencoder(out: str, scale: float) -> None:
    """Train the autoencoder that the miniatures share, and nothing else.

    \b
    raydiff mini autoencoder --out my-autoencoder
    raydiff mini train --autoencoder my-autoencoder --out my-models
    """
    from raydiff.mini.train import train_shared

    click.echo(str(train_shared(out, scale=scale, log=click.echo)))


@mini.command()
@click.argument("families", nargs=-1, type=click.Choice(["sd21", "sdxl"]))
@click.option("--out", required=True, type=click.Path(), help="Folder for mini-sd21, mini-sdxl.")
@click.option(
    "--autoencoder",
    type=click.Path(exists=True, file_okay=False),
    help="One from `raydiff mini autoencoder`, in place of training it first.",
)
@_SCALE
def train(families: tuple[Any, ...], out: str, autoencoder: str | None, scale: float) -> None:
    """Train the miniatures FAMILIES (both if none is named) from nothing.

    On a GPU both take minutes; on a CPU, days. The result is a pipeline folder each, for
    --model. `raydiff bench mini OUT/mini-sd21` measures it.

    \b
    raydiff mini train --out my-models
    raydiff mini train sd21 --out my-models --scale 0.01
    """
    from raydiff.mini.recipe import FAMILIES
    from raydiff.mini.train import train as run

    chosen = families or FAMILIES
    for folder in run(out, chosen, autoencoder=autoencoder, scale=scale, log=click.echo):
        click.echo(str(folder))
