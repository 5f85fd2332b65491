"""Reports on checkpoints, from headers only."""

from pathlib import Path

import pytest

from raydiff.errors import ModelError
from raydiff.weights.inspect import inspect_path
from tests.weights.folders import save_folder
from tests.weights.original import sdxl_shapes, write_header_only
from tests.weights.test_original_files import FULL_SIZE, SMALL_SD21


def test_a_full_size_single_file(tmp_path: Path) -> None:
    path = tmp_path / "sdxl.safetensors"
    write_header_only(path, sdxl_shapes())
    report = inspect_path(path)
    assert (report.layout, report.family) == ("single file", "sdxl")
    counted = {part.name: (part.num_tensors, part.num_parameters) for part in report.components}
    assert counted == FULL_SIZE["sdxl"]
    assert {part.name: part.size_bytes for part in report.components}["unet"] == 5_134_927_368
    assert all(part.dtypes == {"F16": part.num_tensors} for part in report.components)
    assert "conditioner.embedders.1.model.logit_scale" in report.skipped


def test_a_folder_reports_the_files_that_would_be_loaded(tmp_path: Path) -> None:
    saved = save_folder(tmp_path, "sd21", variants=(None, "fp16"))
    report = inspect_path(tmp_path)
    assert (report.layout, report.family) == ("folder", "sd21")
    for part in report.components:
        parameters = sum(tensor.numel() for tensor in saved[part.name].values())
        assert part.num_tensors == len(saved[part.name])
        assert part.num_parameters == parameters
        assert part.size_bytes == 2 * parameters
        assert part.dtypes == {"F16": part.num_tensors}


def test_a_component_folder_reports_each_file(tmp_path: Path) -> None:
    save_folder(tmp_path, "sd21", variants=(None, "fp16"))
    report = inspect_path(tmp_path / "unet")
    assert (report.layout, report.family) == ("tensors", None)
    assert {part.name: part.dtypes for part in report.components} == {
        "diffusion_pytorch_model.fp16.safetensors": {"F16": report.components[0].num_tensors},
        "diffusion_pytorch_model.safetensors": {"F32": report.components[0].num_tensors},
    }


def test_any_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    write_header_only(path, {"lora_up": (4, 2), "lora_down": (2, 4)})
    (part,) = inspect_path(path).components
    assert (part.name, part.num_tensors, part.num_parameters) == ("lora.safetensors", 2, 16)


def test_a_merged_file_shows_what_no_table_knows(tmp_path: Path) -> None:
    path = tmp_path / "merged.safetensors"
    write_header_only(path, SMALL_SD21 | {"control_model.x": (5,)})
    part = inspect_path(path).components[-1]
    assert (part.name, part.num_tensors, part.num_parameters) == ("unknown", 1, 5)


def test_nothing_to_inspect(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json and no \.safetensors file"):
        inspect_path(tmp_path)
    with pytest.raises(ModelError, match="No such file"):
        inspect_path(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="refused"):
        inspect_path(tmp_path / "model.bin")
