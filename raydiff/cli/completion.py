"""`raydiff completion`: the script that completes commands and options in a shell."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete raydiff's commands, options and choices with the tab key.

    Add the line for your shell to its start-up file, ~/.bashrc or ~/.zshrc (there after
    `compinit`); fish reads a folder. Then open a new shell.

    \b
    raydiff completion bash                                          # look at it
    eval "$(raydiff completion bash)"                                # ~/.bashrc
    eval "$(raydiff completion zsh)"                                 # ~/.zshrc
    raydiff completion fish > ~/.config/fish/completions/raydiff.fish
    """
    from raydiff.cli import main

    complete = get_completion_class(shell)
    if complete is not None:
        script = complete(main, {}, "raydiff", "_RAYDIFF_COMPLETE")
        text = script.source_template % script.source_vars()
        # Where raydiff has nothing to offer, as for a folder, bash falls back to file names.
        click.echo(text.replace("complete -o nosort -F", "complete -o nosort -o default -F"))
