"""LTX-2's latent upsampler against diffusers' at fp32, on random weights, norms and inputs."""

import pytest
import torch
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

from raydiff.models.ltx2.upsampler import LTX2Upsampler, LTX2UpsamplerConfig
from tests.parity.reference_weights import with_weights_of
from tests.relative_error import relative_error

SMALL = {"in_channels": 16, "mid_channels": 64, "num_blocks_per_stage": 2}
LAYOUTS = {
    "2.0": {},
    "2.3": {"use_rational_resampler": False},
    "temporal": {"spatial_upsample": False, "temporal_upsample": True},
    "spatiotemporal": {"temporal_upsample": True},
}


@torch.no_grad()
def reference_model(layout, seed=0):
    model = LTX2LatentUpsamplerModel(**SMALL, **LAYOUTS[layout]).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
    return model


def our_model(reference):
    return with_weights_of(
        reference, lambda config: LTX2Upsampler(LTX2UpsamplerConfig.from_dict(config))
    )


@pytest.mark.parametrize("is_prepared", [False, True], ids=["loaded", "prepared"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_upsampler_equals_diffusers(layout, is_prepared):
    reference = reference_model(layout)
    model = our_model(reference)
    if is_prepared:
        model.prepare_for_inference()
    latents = torch.randn(2, 16, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    expected = reference(latents)
    out = model(latents)
    assert out.shape == expected.shape
    assert relative_error(out, expected) <= 1e-5


@torch.no_grad()
def test_temporal_upsampling_drops_the_first_frame():
    latents = torch.randn(1, 16, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    assert our_model(reference_model("temporal"))(latents).shape == (1, 16, 7, 2, 2)
    assert our_model(reference_model("spatiotemporal"))(latents).shape == (1, 16, 7, 4, 4)


@torch.no_grad()
def test_bfloat16_stays_near_float32():
    model = our_model(reference_model("2.0"))
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    exact = model(latents)
    rounded = model.bfloat16()(latents)
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded, exact) <= 0.03


@pytest.mark.parametrize(
    ("layout", "num_tensors", "num_parameters"),
    [
        ("2.0", 73, 497_867_904),
        ("2.3", 72, 497_867_904),
        ("temporal", 72, 516_740_224),
        ("spatiotemporal", 72, 686_615_680),
    ],
)
def test_full_size_has_the_checkpoints_tensors(layout, num_tensors, num_parameters):
    with torch.device("meta"):
        reference = LTX2LatentUpsamplerModel(**LAYOUTS[layout])
        model = LTX2Upsampler(LTX2UpsamplerConfig.from_dict(dict(reference.config)))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert len(shapes) == num_tensors
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
