"""`raydiff sweep` and job files with a sweep, as a user calls them."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import raydiff
from tests.cli.command import cli


def test_a_sweep_is_shown_then_written(tmp_path: Path) -> None:
    prompts = ['say "hi"', "an owl"]
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\n" + "".join(f"{p}\tx\n" for p in prompts))
    arguments = [
        "sweep", "p.tsv", "--seeds", "0-3", "--grid", "guidance_scale=3,7.5",
        "--grid", "sampler=euler,ddim", "--grid", 'style=oil,"ink, wash"',
        "--template", "{prompt}, {style} {a|b}",
    ]  # fmt: skip
    shown = cli(*arguments, "--dry-run", cwd=tmp_path).stdout
    assert "128 rows (cartesian)" in shown
    assert "guidance_scale          2  3, 7.5" in shown
    assert 'say \\"hi\\", oil a' in shown
    assert {path.name for path in tmp_path.iterdir()} == {"p.tsv"}

    written = cli(*arguments, "--out", "m.parquet", cwd=tmp_path).stdout
    assert "wrote m.parquet" in written
    rows = pq.read_table(tmp_path / "m.parquet").to_pylist()
    assert len(rows) == 2 * 2 * 2 * 2 * 2 * 4
    assert rows[-1] == {
        "prompt": "an owl, ink, wash b", "guidance_scale": 7.5, "sampler": "ddim",
        "style": "ink, wash", "seed": 3, "Category": "x", "source_prompt": "an owl",
        "template": "{prompt}, {style} {a|b}", "choice_1": "b",
    }  # fmt: skip
    assert "--force" in cli(*arguments, "--out", "m.parquet", cwd=tmp_path, status=2).stderr
    report = json.loads(
        cli(
            *arguments, "--out", "m.parquet", "--force", "--rows-per-file", "50", "--json",
            cwd=tmp_path,
        ).stdout
    )  # fmt: skip
    assert report["num_rows"] == 128
    assert report["written"]["num_files"] == 3
    assert [axis["name"] for axis in report["axes"]] == [
        "prompts", "template", "guidance_scale", "sampler", "style", "seed",
    ]  # fmt: skip
    assert pq.read_table(tmp_path / "m.parquet").to_pylist() == rows
    assert {path.name for path in tmp_path.iterdir()} == {"p.tsv", "m.parquet"}


JOB = """
model: {{name: {model}}}
out: out
prompts: [a fox, an owl]
sweep:
  template: "{{prompt}} in {{place}}, {{x|y}}"
  grid:
    place: [snow, "the sea, far"]
    guidance_scale: 2,3
  seeds: 5-6
defaults: {{num_inference_steps: 1}}
"""


def test_a_job_file_holds_its_sweep(tiny_sd21: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB.format(model=tiny_sd21))
    planned = cli("plan", "job.yaml", cwd=tmp_path).stdout
    assert "32 rows, 32 images: 32 distinct" in planned
    assert "2  snow, the sea, far" in planned
    report = json.loads(cli("plan", "job.yaml", "--json", cwd=tmp_path).stdout)
    assert [axis["num_values"] for axis in report["axes"]] == [2, 2, 2, 2, 2]
    smaller = ["--set", "sweep.grid.guidance_scale=2", "--set", "sweep.seeds=5"]
    summary = json.loads(cli("render", "job.yaml", *smaller, "--json", cwd=tmp_path).stdout)
    assert summary["completed"] == 8
    rows = raydiff.read_results(tmp_path / "out").sort_by("row_index").to_pylist()
    assert [row["prompt"] for row in rows] == [
        f"{prompt} in {place}, {mood}"
        for prompt in ("a fox", "an owl")
        for mood in "xy"
        for place in ("snow", "the sea, far")
    ]
    assert rows[-1]["place"] == "the sea, far"
    assert (rows[-1]["choice_1"], rows[-1]["source_prompt"]) == ("y", "an owl")
    assert {row["seed"] for row in rows} == {5}
    again = json.loads(cli("render", "job.yaml", *smaller, "--json", cwd=tmp_path).stdout)
    assert again["ended"] == 0
    other = cli("render", "job.yaml", *smaller, "--set", "sweep.seeds=6", cwd=tmp_path, status=2)
    assert "it holds another run: manifest was" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], "--out"),
        (["--out", "m.parquet"], "nothing to sweep over"),
        (["--prompt", "x", "--grid", "guidence_scale=3"], 'did you mean "guidance_scale"?'),
        (["--prompt", "x", "--grid", "guidance_scale="], "has no values"),
        (["--prompt", "x", "--grid", "guidance_scale"], "expected COLUMN=VALUES"),
        (["--prompt", "x", "--grid", "sampler=euler", "--grid", "sampler=ddim"], "there twice"),
        (["--prompt", "x", "--seeds", "0-999999999"], "--max-rows 1000000000"),
        (["--template", "a __b__", "--wildcards", "w"], "__b__ -> __c__ -> __b__ is a loop"),
        (["--template", "a {colour}"], "nothing fills the field {colour}"),
        (["gone.txt", "--seeds", "0-9"], "gone.txt does not exist"),
        (["job.yaml", "--seeds", "0-9"], "is a job file"),
    ],
)
def test_bad_input_is_one_clear_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "b.txt").write_text("__c__")
    (folder / "c.txt").write_text("x\n__b__")
    is_to_write = len(arguments) != 2 or arguments[0] == "--template"
    if is_to_write and "--out" not in arguments:
        arguments = [*arguments, "--out", "m.parquet"]
    run = cli("sweep", *arguments, cwd=tmp_path, status=2)
    assert message in run.stderr
    assert list(tmp_path.iterdir()) == [folder]


def test_a_job_file_with_a_wrong_sweep(tmp_path: Path) -> None:
    for text, message in [
        ("sweep: {seed: 1}", 'sweep.seed: unknown key; did you mean "seeds"?'),
        ("sweep: {mode: zipped}", "sweep.mode: 'zipped'"),
        ("sweep: {seeds: 0-9}", "nothing to render"),
        ("prompts: [x]\nsweep: {grid: {sampler: {a: 1}}}", "sweep.grid"),
        ("prompts: [x]\nsweep: {grid: {smpler: euler}}", 'did you mean "sampler"?'),
    ]:
        (tmp_path / "job.yaml").write_text(text)
        assert message in cli("plan", "job.yaml", cwd=tmp_path, status=2).stderr
