"""The miniatures as they ship: small, in half precision, and found by their short names."""

from pathlib import Path

import pytest
from safetensors import safe_open

import raydiff
from raydiff.bench.mini import MINIATURES, request_of
from raydiff.mini.recipe import RECIPES
from raydiff.weights.aliases import alias_names, read_alias
from raydiff.weights.folder import read_json
from raydiff.weights.resolve import resolve_model

MAX_BYTES = 5_000_000
ROOT = Path(__file__).parents[2]


def test_every_alias_of_the_package_is_a_miniature() -> None:
    packaged = [name for name in alias_names() if read_alias(name).path is not None]
    assert sorted(packaged) == sorted(MINIATURES)


@pytest.mark.parametrize("name", MINIATURES)
def test_a_miniature_is_small_and_what_its_alias_says(name: str) -> None:
    alias = read_alias(name)
    folder = alias.path
    assert folder is not None
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
    info = resolve_model(name)
    assert info.family == alias.family
    assert info.tasks == ("txt2img", "img2img")
    assert (info.default_height, info.default_width) == (128, 128)
    assert info.default_guidance_scale == alias.defaults["guidance_scale"]
    assert info.default_num_inference_steps == alias.defaults["num_inference_steps"]


@pytest.mark.parametrize("name", MINIATURES)
def test_a_miniature_is_what_the_committed_recipe_makes(name: str) -> None:
    folder = read_alias(name).path
    assert folder is not None
    recipe = RECIPES[name.removeprefix("mini-")]  # type: ignore[index]
    assert read_json(folder / "unet" / "config.json") == recipe.unet
    assert read_json(folder / "scheduler" / "scheduler_config.json") == recipe.scheduler
    for encoder, config in recipe.text_encoders.items():
        assert read_json(folder / encoder / "config.json").items() >= config.items()


def test_any_sampler_draws_what_is_asked_for() -> None:
    from raydiff.mini.measure import find_objects

    for name in MINIATURES:
        pipeline = raydiff.load_pipeline(name)
        info = pipeline.info
        requests = [
            request_of(
                info,
                "a large red circle left of a large blue square",
                seed,
                num_inference_steps=50 if sampler == "pndm" else 20,
                sampler=sampler,
            )
            for seed, sampler in enumerate(info.samplers)
        ]
        for request, pixels in zip(requests, pipeline.render(requests).pixels, strict=True):
            found = {(one.color, one.shape) for one in find_objects(pixels)}
            assert found == {("red", "circle"), ("blue", "square")}, (name, request.sampler)
