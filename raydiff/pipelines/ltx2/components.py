"""What an LTX-2 checkpoint is loaded as, and what its stages hand to each other."""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from raydiff.diffusion.flow_match import FlowMatchConfig
from raydiff.errors import ConfigError
from raydiff.gemma_tokenizer import GemmaTokenizer
from raydiff.models.gemma3 import Gemma3TextEncoder
from raydiff.models.ltx2.audio_vae import AudioVAE, AudioVAEConfig
from raydiff.models.ltx2.connectors import LTX2Connectors
from raydiff.models.ltx2.rope import LatentSize
from raydiff.models.ltx2.transformer import LTX2Transformer
from raydiff.models.ltx2.upsampler import LTX2Upsampler
from raydiff.models.ltx2.video_vae import LTX2VideoVAE
from raydiff.models.ltx2.vocoder import Vocoder, VocoderWithBWE
from raydiff.pipelines.prompt_cache import EncodedPrompt
from raydiff.weights.components import Stage

M = TypeVar("M")


@dataclass(frozen=True, kw_only=True, slots=True)
class LTX2Components:
    """The loaded parts of one checkpoint: those of the stages that were asked for."""

    tokenizer: GemmaTokenizer | None
    text_encoder: Gemma3TextEncoder | None
    connectors: LTX2Connectors | None
    """Of both encode (their projections) and denoise (the rest of them)."""
    transformer: LTX2Transformer | None
    refine_transformer: LTX2Transformer | None
    """Denoises the second stage where that takes other weights (the distilled LoRA's, merged into a
    checkpoint that is not distilled); None where it is the transformer itself."""
    vae: LTX2VideoVAE | None
    """Of denoise (its sizes, statistics and, for first frames, its encoder) and decode."""
    latent_upsampler: LTX2Upsampler | None
    audio_vae: AudioVAE | None
    vocoder: Vocoder | VocoderWithBWE | None
    """Loaded in float32, whatever the rest is in."""
    audio_config: AudioVAEConfig
    schedule: FlowMatchConfig
    num_text_embeds: int
    """What the tokenizer pads to: so many embeddings the transformer sees of each text."""

    @property
    def transformers(self) -> list[LTX2Transformer]:
        """Both stages', those that are loaded."""
        return [one for one in (self.transformer, self.refine_transformer) if one is not None]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What is loaded, by component name; the transformer first."""
        modules: dict[str, nn.Module | None] = {
            "transformer": self.transformer,
            "refine_transformer": self.refine_transformer,
            "text_encoder": self.text_encoder,
            "connectors": self.connectors,
            "vae": self.vae,
            "latent_upsampler": self.latent_upsampler,
            "audio_vae": self.audio_vae,
            "vocoder": self.vocoder,
        }
        return {name: module for name, module in modules.items() if module is not None}

    def needed(self, part: M | None, stage: Stage) -> M:
        """Return a part, or raise ConfigError where it was not loaded."""
        if part is None:
            raise ConfigError(
                f"{stage}: this pipeline has only {', '.join(self.modules)}. "
                f"Load it with {stage!r} among its stages."
            )
        return part


class LTX2Embeds(NamedTuple):
    """Encoded texts of a batch."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str | None, ...]
    """None in rows that have no pass under a negative prompt."""
    encoded: dict[str, EncodedPrompt]
    """Each of these texts, once."""
    warnings: tuple[str | None, ...]


class ClipLatents(NamedTuple):
    """One clip's normalised latents, float32."""

    video: Tensor
    """(C, F, h, w)."""
    audio: Tensor
    """(M, C'), a token for each latent frame."""

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.video.nbytes + self.audio.nbytes


def pack(latents: Tensor) -> Tensor:
    """(B, C, F, h, w) -> (B, F * h * w, C), a token for each latent."""
    return latents.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, size: LatentSize) -> Tensor:
    """Undo `pack`."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *size)
