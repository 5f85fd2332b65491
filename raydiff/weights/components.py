"""Which components a checkpoint may have, and which stage of a pipeline uses each: what a worker
loads, and what is fetched for it."""

from collections.abc import Callable, Collection
from typing import Literal

from raydiff.config import LTX2Config

Stage = Literal["encode", "denoise", "decode"]
STAGES: tuple[Stage, ...] = ("encode", "denoise", "decode")

STAGES_OF: dict[str, frozenset[Stage]] = {
    "text_encoder": frozenset({"encode"}),
    "text_encoder_2": frozenset({"encode"}),
    # Their projections belong to a text's encoding, the rest of them to the transformer.
    "connectors": frozenset({"encode", "denoise"}),
    "unet": frozenset({"denoise"}),
    "transformer": frozenset({"denoise"}),
    "refine_transformer": frozenset({"denoise"}),
    "latent_upsampler": frozenset({"denoise"}),
    # Init images and first frames are encoded where they are denoised.
    "vae": frozenset({"denoise", "decode"}),
    "audio_vae": frozenset({"decode"}),
    "vocoder": frozenset({"decode"}),
}
"""The stages that use a component."""

Needed = Callable[[Collection[str]], Collection[str]]
"""Given the components that a checkpoint has, returns those whose weights are of use."""


def needed_components(
    components: Collection[str], stages: Collection[Stage], ltx2: LTX2Config
) -> frozenset[str]:
    """Return those of a checkpoint's components that the stages use."""
    using = set(stages)
    if "transformer" in components and ltx2.text_encoder != "gemma3":
        using.discard("encode")  # Features that come from elsewhere take no weights.
    return frozenset(name for name in components if not STAGES_OF[name].isdisjoint(using))


def needed_by(stages: Collection[Stage], ltx2: LTX2Config) -> Needed:
    """Return what `needed_components` returns of any checkpoint's components."""
    return lambda components: needed_components(components, stages, ltx2)
