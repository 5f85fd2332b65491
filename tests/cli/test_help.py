"""Where a newcomer starts: `raydiff` alone, the help of every command, completion in the shells."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from raydiff.cli import COMMANDS, main

RUN = "import sys; from raydiff.cli import main; main(prog_name='raydiff')"


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run raydiff as its script does; what it imported is the last line on standard error."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print({'torch', 'ray'} & set(sys.modules), file=sys.stderr))\n"
        f"{RUN}"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"COLUMNS": "100"} | environ,
    )


def complete(*words: str) -> list[str]:
    """Return what bash is offered for the last of `words`."""
    answer = run(
        _RAYDIFF_COMPLETE="bash_complete",
        COMP_WORDS=" ".join(["raydiff", *words]),
        COMP_CWORD=str(len(words)),
    )
    assert answer.stderr.strip() == "set()", answer.stderr
    return [line.partition(",")[2] for line in answer.stdout.splitlines()]


def walk(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command below `command` with the words that call it."""
    if path:
        yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from walk(child, *path, name)


def test_raydiff_alone_shows_where_to_start() -> None:
    alone = run()
    assert alone.returncode == 0
    assert alone.stderr.strip() == "set()"
    for line in ("--model mini-sd21", "raydiff render --prompt", "raydiff plan", "--help"):
        assert line in alone.stdout
    assert len(alone.stdout.splitlines()) < 24
    unknown = run("rendre")
    assert unknown.returncode == 2
    assert 'did you mean "render"?' in unknown.stderr


def test_the_first_commands_shown_are_valid() -> None:
    from raydiff.cli import START

    shown = [line.split()[1:] for line in START.splitlines() if line.startswith("  raydiff ")]
    assert len(shown) >= 5
    context = click.Context(main)
    for name, *arguments in shown:
        command = main.get_command(context, name)
        assert command is not None, name
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= options


def test_every_command_has_an_example_and_its_help_needs_no_torch_and_no_ray() -> None:
    code = (
        "import sys\nfrom tests.cli.test_help import examples\n"
        "print(*examples(), sep='\\n')\n"
        "print({'torch', 'ray'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, imported = shown.stdout.splitlines()
    assert imported == "set()"
    assert len(lines) >= len(COMMANDS) + 5
    for line in lines:
        path, _, example = line.partition(": ")
        assert example, f"`raydiff {path} --help` has no line that begins with `raydiff {path}`"


def examples() -> Iterator[str]:
    """Yield `PATH: EXAMPLE` for every command; the example is empty where its help has none."""
    for path, command in walk(main):
        text = command.get_help(click.Context(command, info_name=" ".join(path)))
        call = " ".join(("raydiff", *path))
        lines = (line.strip() for line in text.splitlines())
        yield f"{' '.join(path)}: " + next(
            (one for one in lines if f"{one} ".startswith(f"{call} ")), ""
        )


def test_commands_options_and_choices_are_completed() -> None:
    assert "render" in complete("re")
    assert all(name.startswith("re") for name in complete("re"))
    assert set(complete("")) >= set(COMMANDS)
    assert complete("render", "--mo") == ["--model"]
    assert "gpu_poor" in complete("render", "--profile", "gpu")
    assert complete("models", "make") == ["make-tiny"]
    for name in ("render", "status", "score", "diff", "sheet"):
        assert complete(name, "ren") == ["ren"]  # a path, which the shell itself completes
    assert complete("models", "make-tiny", "sd") == ["sd21", "sdxl"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_each_shell(shell: str) -> None:
    script = run("completion", shell)
    assert script.returncode == 0
    assert script.stderr.strip() == "set()"
    assert f"_RAYDIFF_COMPLETE={shell}_complete" in script.stdout
    assert "raydiff" in script.stdout


def test_bash_takes_the_script_and_completes_with_it(tmp_path: Path) -> None:
    command = tmp_path / "raydiff"
    command.write_text(f"#!{sys.executable}\n{RUN}\n")
    command.chmod(0o755)
    checked = (
        'eval "$(raydiff completion bash)"\n'
        "COMP_WORDS=(raydiff sta) COMP_CWORD=1\n_raydiff_completion raydiff sta\n"
        "echo ${COMPREPLY[@]}; complete -p raydiff"
    )
    environ = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    bash = subprocess.run(
        ["bash", "-c", checked], capture_output=True, text=True, check=True, env=environ
    )
    completed, registered = bash.stdout.splitlines()
    assert completed == "status", bash.stderr
    assert "default" in registered  # file names where raydiff has nothing to offer


def test_an_unknown_shell_is_refused() -> None:
    refused = run("completion", "tcsh")
    assert refused.returncode == 2
    assert "'bash', 'zsh', 'fish'" in refused.stderr
