"""`raydiff mini`: draw the miniatures' training scenes, and train miniatures."""

from typing import Any

import click


@click.group()
def mini() -> None:
    """Make the miniature models that ship with raydiff, or ones of your own.

    \b
    raydiff mini draw scenes.png
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


@mini.command()
@click.argument("families", nargs=-1, type=click.Choice(["sd21", "sdxl"]))
@click.option("--out", required=True, type=click.Path(), help="Folder for mini-sd21, mini-sdxl.")
@click.option(
    "--scale",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 10, min_open=True),
    help="Share of the scenes and steps: less for a try, more for longer training.",
)
def train(families: tuple[Any, ...], out: str, scale: float) -> None:
    """Train the miniatures FAMILIES (both if none is named) from nothing.

    On a GPU both take minutes; on a CPU, a night. The result is a pipeline folder each, for
    --model. `raydiff bench mini OUT/mini-sd21` measures it.

    \b
    raydiff mini train --out my-models
    raydiff mini train sd21 --out my-models --scale 0.01
    """
    from raydiff.mini.recipe import FAMILIES
    from raydiff.mini.train import train as run

    for folder in run(out, families or FAMILIES, scale=scale, log=click.echo):
        click.echo(str(folder))
