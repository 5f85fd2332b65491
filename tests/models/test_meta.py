"""Modules without values: nothing is drawn for them, and torch's compiler stays out."""

import subprocess
import sys

import torch
from torch import nn

from raydiff.models.meta import on_meta

LOADS = """
import sys
import raydiff.engine.renderers
from raydiff.models.meta import on_meta
from torch import nn

with on_meta():
    nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Conv2d(4, 4, 3), nn.LayerNorm(4))
print("torch._dynamo" in sys.modules)
"""


def test_parameters_have_shapes_and_no_values() -> None:
    state = torch.get_rng_state()
    with on_meta():
        embedding, linear = nn.Embedding(5, 3), nn.Linear(3, 2)
        counts = torch.arange(4)
    assert (embedding.weight.shape, embedding.weight.device.type) == ((5, 3), "meta")
    assert (linear.weight.shape, linear.weight.device.type) == ((2, 3), "meta")
    assert counts.device.type == "meta"
    assert torch.equal(torch.get_rng_state(), state)
    assert nn.Linear(3, 2).weight.abs().max() > 0


def test_a_worker_starts_without_the_compiler() -> None:
    run = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
