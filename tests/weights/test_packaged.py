"""Aliases of checkpoints that ship inside the raydiff package, and an alias's own defaults."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from raydiff.cli import main
from raydiff.config import load_config
from raydiff.engine.known_models import known_models
from raydiff.engine.plan import open_rows, plan
from raydiff.errors import ConfigError, ModelError
from raydiff.manifest.rows import read_rows
from raydiff.weights import hub
from raydiff.weights.aliases import PACKAGE, read_alias
from raydiff.weights.checkpoint import list_files
from raydiff.weights.resolve import resolve_model
from tests.weights.folders import save_folder
from tests.weights.packaged import add_alias, package_in


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package folder, no way to the Hub, and a working directory with nothing in it."""
    monkeypatch.setitem(sys.modules, "raydiff.weights.hub", None)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return package_in(tmp_path / "package", monkeypatch)


@pytest.fixture
def mini_sd21(package: Path) -> Path:
    folder = package / "mini" / "weights" / "mini-sd21"
    save_folder(folder, "sd21")
    return folder


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_a_packaged_checkpoint_is_found_without_the_hub(package: Path, family: str) -> None:
    folder = package / "mini" / "weights" / f"mini-{family}"
    save_folder(folder, family)
    info, unnamed = resolve_model(f"mini-{family}"), resolve_model(str(folder))
    assert (info.name, info.family, info.path) == (f"mini-{family}", family, str(folder))
    assert info.revision == unnamed.revision
    assert info.revision.startswith("local-")
    assert info.num_parameters == unnamed.num_parameters
    # The alias's defaults; the folder by its path has the family's.
    assert unnamed.default_num_inference_steps == 50
    assert info.default_num_inference_steps == 20
    assert (info.default_guidance_scale, info.default_strength) == (3.0, 0.8)
    assert resolve_model(f"mini-{family}", has_weights=False) == info


def test_the_aliases_folders_are_inside_the_package() -> None:
    assert (PACKAGE / "weights" / "aliases.py").is_file()
    for name in ("mini-sd21", "mini-sdxl"):
        alias = read_alias(name)
        assert alias.path == PACKAGE / "mini" / "weights" / name
        assert alias.repo is None
        assert not alias.gated
    assert read_alias("sdxl").path is None


def test_a_packaged_checkpoint_takes_no_revision(mini_sd21: Path) -> None:
    message = "^mini-sd21: a local checkpoint has no revision 'main'; leave model.revision out$"
    with pytest.raises(ModelError, match=message):
        resolve_model("mini-sd21", revision="main")


@pytest.mark.parametrize("is_empty_folder", [False, True])
def test_a_packaged_checkpoint_that_is_missing(package: Path, is_empty_folder: bool) -> None:
    folder = package / "mini" / "weights" / "mini-sd21"
    if is_empty_folder:
        folder.mkdir(parents=True)
    message = f"^mini-sd21: no checkpoint in {re.escape(str(folder))}, so the installation is inc"
    for has_weights in (True, False):
        with pytest.raises(ModelError, match=message):
            resolve_model("mini-sd21", has_weights=has_weights)


def test_a_local_checkpoint_of_the_aliass_name_comes_first(mini_sd21: Path) -> None:
    Path("mini-sd21").mkdir()
    assert resolve_model("mini-sd21").path == str(mini_sd21)  # a folder, but no checkpoint
    save_folder(Path("mini-sd21"), "sdxl")
    info = resolve_model("mini-sd21")
    assert (info.family, info.path) == ("sdxl", str(Path("mini-sd21").resolve()))
    assert (info.default_num_inference_steps, info.default_strength) == (50, 0.3)


def test_rows_and_runs_lie_over_the_aliass_defaults(mini_sd21: Path) -> None:
    config = load_config(
        overrides={"model.name": "mini-sd21", "defaults.guidance_scale": 6.0, "prompts": ["a fox"]}
    )
    models = known_models(config.model, is_loaded_here=False)
    (row,) = read_rows(open_rows(config), config=config, models=models)
    assert row.request is not None
    assert (row.request.num_inference_steps, row.request.guidance_scale) == (20, 6.0)
    assert (row.request.model, row.request.height) == ("mini-sd21", 16)
    assert models.revisions == {"mini-sd21": resolve_model(str(mini_sd21)).revision}
    assert plan(config).num_new == 1


def test_a_manifests_columns_lie_over_the_aliass_defaults(mini_sd21: Path) -> None:
    columns = {
        "prompt": ["a fox", "an owl"],
        "num_inference_steps": [None, 7],
        "guidance_scale": [None, 2.5],
    }
    pq.write_table(pa.table(columns), "rows.parquet")
    config = load_config(overrides={"model.name": "mini-sd21", "manifest": "rows.parquet"})
    rows = read_rows(open_rows(config), config=config, models=known_models(config.model))
    requests = [row.request for row in rows]
    assert [(one.num_inference_steps, one.guidance_scale) for one in requests if one] == [
        (20, 3.0),
        (7, 2.5),
    ]


def test_the_list_says_where_a_packaged_checkpoint_lies(package: Path) -> None:
    listed = CliRunner().invoke(main, ["models", "list"])
    place = package / "mini" / "weights" / "mini-sd21"
    assert listed.exit_code == 0
    assert f"ships with raydiff\n  {place} (Apache-2.0)\n" in listed.output
    values = json.loads(CliRunner().invoke(main, ["models", "list", "--json"]).output)
    (mini,) = [alias for alias in values if alias["name"] == "mini-sd21"]
    assert (mini["repo"], mini["folder"]) == (None, "mini/weights/mini-sd21")
    assert mini["defaults"] == {"num_inference_steps": 20, "guidance_scale": 3.0, "strength": 0.8}


def test_a_pull_says_that_it_is_here(mini_sd21: Path) -> None:
    pulled = CliRunner().invoke(main, ["models", "pull", "mini-sd21"])
    assert pulled.exit_code == 0
    assert pulled.output.endswith(f"is at {mini_sd21}\n")


def test_an_alias_of_the_hub_has_defaults_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "0123abc"
    save_folder(snapshot, "sd21")
    asked: list[tuple[str, str | None]] = []

    def download(repo: str, *, revision: str | None, **_: Any) -> hub.HubFolder:
        asked.append((repo, revision))
        files = list_files(snapshot, variant="auto", dtype="auto")
        return hub.HubFolder(repo=repo, path=snapshot, files=files)

    monkeypatch.setattr(hub, "download_model", download)
    values = {"repo": "org/turbo", "revision": "v1", "defaults": {"num_inference_steps": 4}}
    add_alias("turbo", tmp_path / "configs", monkeypatch, **values)
    info = resolve_model("turbo")
    assert (info.revision, info.default_num_inference_steps) == ("0123abc", 4)
    assert (info.default_guidance_scale, info.default_strength) == (7.5, 0.8)
    assert resolve_model("org/other").default_num_inference_steps == 50
    resolve_model("turbo", revision="v2")
    assert asked == [("org/turbo", "v1"), ("org/other", None), ("org/turbo", "v2")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give repo or folder, one of the two"),
        ({"repo": "org/a", "folder": "a"}, "give repo or folder, one of the two"),
        (
            {"folder": "a", "defaults": {"guidance": 3.0}},
            "defaults: there is no 'guidance'; did you mean \"guidance_scale\"",
        ),
        ({"folder": "a", "path": "b"}, "unexpected keyword argument 'path'"),
    ],
)
def test_a_wrong_alias_file(
    values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = add_alias("wrong", tmp_path / "configs", monkeypatch, **values)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}: .*{re.escape(message)}"):
        read_alias("wrong")
