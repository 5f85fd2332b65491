"""Strict loading: names, shapes, dtypes, and memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raydiff.errors import ModelError
from raydiff.weights.checkpoint import Checkpoint, component_sources
from raydiff.weights.load import load_weights
from tests.weights.modules import meta_module

SHAPES: dict[str, tuple[int, ...]] = {
    "conv.weight": (6, 4, 3, 3),
    "conv.bias": (6,),
    "blocks.0.norm.weight": (5,),
    "scale": (),
}


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    """A checkpoint whose only component is `unet`."""
    path = folder / "weights.safetensors"
    save_file(tensors, path)
    sources = {"unet": component_sources("unet", [path], {})}
    return Checkpoint(path=folder, family="sd21", configs={}, sources=sources)


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32):
    torch.manual_seed(3)
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_into_every_dtype(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    tensors = random_tensors(SHAPES, stored)
    module = load_weights(
        meta_module(SHAPES), saved(tmp_path, tensors), "unet", device="cpu", dtype=wanted
    )
    loaded = dict(module.named_parameters())
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.to(wanted))
        assert loaded[name].dtype == wanted
        assert loaded[name].is_contiguous()
        assert not loaded[name].requires_grad
    assert not module.training


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPES)
    checkpoint = saved(tmp_path, tensors)
    module = load_weights(
        meta_module(SHAPES), checkpoint, "unet", device="cpu", dtype=torch.float32
    )
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert torch.equal(module.state_dict()["conv.weight"], tensors["conv.weight"])


def test_wrong_tensors_are_all_named(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPES)
    del tensors["conv.bias"]
    tensors["conv.weight"] = torch.rand(6, 4, 1, 1)
    tensors["extra"] = torch.rand(2)
    with pytest.raises(ModelError) as error:
        load_weights(
            meta_module(SHAPES),
            saved(tmp_path, tensors),
            "unet",
            device="cpu",
            dtype=torch.float32,
        )
    message = str(error.value)
    assert "tensors of unet" in message
    assert "1 missing: conv.bias [6]." in message
    assert "1 unexpected: extra [2]." in message
    assert "1 of another shape: conv.weight is [6, 4, 1, 1], expected [6, 4, 3, 3]." in message


def test_ten_of_many_missing_tensors_are_named(tmp_path: Path) -> None:
    shapes = {f"layer{n}.weight": (2,) for n in range(30)}
    with pytest.raises(ModelError, match=r"30 missing: layer0.*layer9.weight \[2\] and 20 more\."):
        load_weights(
            meta_module(shapes), saved(tmp_path, {}), "unet", device="cpu", dtype=torch.float32
        )


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPES)
    tensors["conv.bias"] = tensors["conv.bias"].to(torch.float8_e5m2)
    with pytest.raises(ModelError, match=r"F16, BF16, F32, F64, F8_E4M3: conv\.bias is F8_E5M2"):
        load_weights(
            meta_module(SHAPES),
            saved(tmp_path, tensors),
            "unet",
            device="cpu",
            dtype=torch.float32,
        )


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, random_tensors(SHAPES))
    path = tmp_path / "weights.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(ModelError, match="changed while it was read"):
        load_weights(meta_module(SHAPES), checkpoint, "unet", device="cpu", dtype=torch.float32)


def test_a_file_that_vanishes_after_opening(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, random_tensors(SHAPES))
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ModelError, match="No such file"):
        load_weights(meta_module(SHAPES), checkpoint, "unet", device="cpu", dtype=torch.float32)


class WithBuffers(nn.Module):
    def __init__(self, *, table_device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, device="meta"))
        self.register_buffer("mean", torch.empty(3, device="meta"))
        table = torch.arange(5, device=table_device)
        self.register_buffer("table", table, persistent=False)


def test_buffers_of_the_checkpoint_and_of_the_module(tmp_path: Path) -> None:
    tensors = random_tensors({"weight": (4,), "mean": (3,)})
    module = WithBuffers(table_device="cpu")
    load_weights(module, saved(tmp_path, tensors), "unet", device="cpu", dtype=torch.bfloat16)
    assert torch.equal(module.mean, tensors["mean"].bfloat16())
    assert module.table.tolist() == [0, 1, 2, 3, 4]
    assert set(module.state_dict()) == {"weight", "mean"}


def test_a_computed_buffer_left_on_meta_is_a_mistake_in_the_module(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, random_tensors({"weight": (4,), "mean": (3,)}))
    module = WithBuffers(table_device="meta")
    with pytest.raises(RuntimeError, match="buffer table is on the meta device"):
        load_weights(module, checkpoint, "unet", device="cpu", dtype=torch.float32)


def test_a_transposed_source(tmp_path: Path) -> None:
    weight = random_tensors({"weight": (3, 5)})["weight"]
    checkpoint = saved(tmp_path, {"weight": weight})
    source = checkpoint.tensors("unet")["weight"]
    turned = replace(source, shape=(5, 3), is_transposed=True)
    checkpoint = replace(checkpoint, sources={"unet": {"weight": turned}})
    module = meta_module({"weight": (5, 3)})
    load_weights(module, checkpoint, "unet", device="cpu", dtype=torch.float32)
    assert torch.equal(module.state_dict()["weight"], weight.T)


MEASURE = """
import json, resource, sys, threading
import psutil, torch
from pathlib import Path
from torch import nn
from raydiff.weights.checkpoint import Checkpoint, component_sources
from raydiff.weights.load import load_weights

def peak_kib():
    # VmHWM, reset through clear_refs, so that importing torch does not count.
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if "VmHWM" in line).split()[1])

count, width, dtype = int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
files = sorted(Path(sys.argv[1]).glob("*.safetensors"))
sources = {"unet": component_sources("unet", files, {})}
checkpoint = Checkpoint(path=Path(sys.argv[1]), family="sd21", configs={}, sources=sources)
with torch.device("meta"):
    module = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(count)])
torch.ones(1 << 22).to(torch.bfloat16)  # its code comes into memory with the first use
Path("/proc/self/clear_refs").write_text("5")
before = psutil.Process().memory_info().rss
load_weights(module, checkpoint, "unet", device="cpu", dtype=dtype)
module_bytes = sum(p.nbytes for p in module.parameters())
print(json.dumps([peak_kib() * 1024 - before, module_bytes]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_host_memory_is_the_module_and_one_tensor(tmp_path: Path, dtype: str) -> None:
    count, width, num_files = 24, 1600, 3  # 24 tensors of 10 MB in 3 files of 82 MB
    generator = torch.Generator().manual_seed(0)
    for index in range(num_files):
        names = range(index, count, num_files)
        save_file(
            {f"{n}.weight": torch.rand(width, width, generator=generator) for n in names},
            tmp_path / f"{index}.safetensors",
        )
    command = [sys.executable, "-c", MEASURE, tmp_path, count, width, dtype]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak_bytes, module_bytes = json.loads(result.stdout)
    tensor_bytes = width * width * 4
    assert module_bytes <= peak_bytes + tensor_bytes
    assert peak_bytes < module_bytes + 2 * tensor_bytes
