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
@click.argument("path", type=click.Path(dir_okay=False))
@click.option("--scenes", default=64, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True)
def draw(path: str, scenes: int, seed: int) -> None:
    """Draw training scenes into the file PATH and print their captions.

    An image shows them in rows of eight; a file that ends in .mp4 shows the clips that mini-ltx2
    learns from, with their sound, one after another.

    \b
    raydiff mini draw scenes.png
    raydiff mini draw clips.mp4 --scenes 10
    """
    from raydiff.mini.ltx2.show import show_clips
    from raydiff.mini.show import draw_scenes

    is_video = path.lower().endswith(".mp4")
    for text in (show_clips if is_video else draw_scenes)(path, scenes, seed):
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
@click.argument("families", nargs=-1, type=click.Choice(["sd21", "sdxl", "ltx2"]))
@click.option("--out", required=True, type=click.Path(), help="Folder for mini-sd21 and the rest.")
@click.option(
    "--autoencoder",
    type=click.Path(exists=True, file_okay=False),
    help="One from `raydiff mini autoencoder`, in place of training the images' first.",
)
@_SCALE
def train(families: tuple[Any, ...], out: str, autoencoder: str | None, scale: float) -> None:
    """Train the miniatures FAMILIES (those that ship if none is named) from nothing.

    On a GPU each takes minutes; on a CPU, ltx2 takes hours and the others days. The result is a
    pipeline folder each, for --model. `raydiff bench mini OUT/mini-sd21` measures it.

    \b
    raydiff mini train --out my-models
    raydiff mini train sd21 --out my-models --scale 0.01
    raydiff mini train ltx2 --out my-models
    """
    from raydiff.mini.recipe import FAMILIES
    from raydiff.mini.train import train as run

    for folder in run(
        out, families or FAMILIES, autoencoder=autoencoder, scale=scale, log=click.echo
    ):
        click.echo(str(folder))
