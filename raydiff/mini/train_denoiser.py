"""A miniature's text encoders and UNet, trained together on the latents of captioned scenes."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from raydiff.diffusion.schedule import ScheduleConfig, alphas_cumprod
from raydiff.mini.optimise import Optimiser, autocast
from raydiff.mini.recipe import Recipe
from raydiff.mini.scenes import CANVAS
from raydiff.mini.slots import SlotReader, Slots
from raydiff.models.clip import CLIPTextConfig, CLIPTextEncoder
from raydiff.models.unet import UNet, UNetConfig


class Denoised(NamedTuple):
    """What a denoiser makes of a batch."""

    predicted: Tensor
    """(B, 4, h, w)"""
    embeds: Tensor
    """(B, S, C): what the UNet was told of captions, before any was dropped."""


class Denoiser(nn.Module):
    """What a miniature learns; the names of the two parts are the pipeline's components."""

    def __init__(self, recipe: Recipe, vocab_sizes: dict[str, int]) -> None:
        super().__init__()
        self.has_zero_negative = recipe.has_zero_negative
        self.text_encoders = nn.ModuleDict(
            {
                name: CLIPTextEncoder(
                    CLIPTextConfig.from_dict(encoder_config(recipe, name, vocab_sizes[name]))
                )
                for name in recipe.text_encoders
            }
        )
        self.unet = UNet(UNetConfig.from_dict(recipe.unet))
        sizes = torch.tensor([CANVAS, CANVAS, 0, 0, CANVAS, CANVAS])
        self.sizes: Tensor
        self.register_buffer("sizes", sizes, persistent=False)

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        input_ids: dict[str, Tensor],
        is_dropped: Tensor,
    ) -> Denoised:
        """noisy (B, 4, h, w), timesteps (B,), ids (B, S).

        Rows that are dropped see zeros where the pipeline has zeros for no negative prompt; where
        it has the empty prompt, their ids are its.
        """
        outputs = [self.text_encoders[name](ids) for name, ids in input_ids.items()]
        if not self.has_zero_negative:
            embeds = outputs[0].last_hidden_state
            return Denoised(self.unet(noisy, timesteps, prompt_embeds=embeds), embeds)
        keep = (~is_dropped).to(outputs[0].penultimate.dtype)
        embeds = torch.cat([output.penultimate for output in outputs], dim=-1)
        predicted = self.unet(
            noisy,
            timesteps,
            prompt_embeds=embeds * keep[:, None, None],
            text_embeds=outputs[-1].pooled * keep[:, None],
            time_ids=self.sizes.expand(len(noisy), -1),
        )
        return Denoised(predicted, embeds)


def encoder_config(recipe: Recipe, name: str, vocab_size: int) -> dict[str, Any]:
    """Return a text encoder's config.json; the two last tokens are bos and eos."""
    return recipe.text_encoders[name] | {
        "vocab_size": vocab_size,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
    }


def train_denoiser(
    recipe: Recipe,
    latents: Tensor,
    slots: Slots,
    input_ids: dict[str, Tensor],
    empty_ids: dict[str, Tensor],
    vocab_sizes: dict[str, int],
    log: Callable[[str], None],
) -> Denoiser:
    """Train from nothing on latents (N, 4, h, w), what is in them, and ids (N, captions, S), all on
    one device."""
    device = latents.device
    torch.manual_seed(recipe.seed)
    denoiser = Denoiser(recipe, vocab_sizes).to(device)
    denoiser.requires_grad_(True)  # text encoders come frozen
    if device.type == "cuda":
        # As its convolutions compute.
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    reader = SlotReader(recipe.unet["cross_attention_dim"]).to(device)
    # Many small kernels become a few.
    denoise = cast(Denoiser, torch.compile(denoiser) if device.type == "cuda" else denoiser)
    alphas = _alphas(recipe).to(device)
    is_v = recipe.scheduler["prediction_type"] == "v_prediction"

    def loss_of() -> Tensor:
        rows = _random(len(latents), recipe.batch_size, device)
        clean = latents[rows].float()
        noise = torch.randn_like(clean)
        timesteps = _random(len(alphas), recipe.batch_size, device)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean if is_v else noise
        is_dropped = torch.rand(recipe.batch_size, device=device) < recipe.caption_dropout
        ids = _captions(input_ids, empty_ids, rows, is_dropped)
        with autocast(device):
            predicted, embeds = denoise(noisy, timesteps, ids, is_dropped)
            slot_loss = reader.loss(embeds, slots.rows(rows), ~is_dropped)
        error = (predicted.float() - target).square()
        if not is_v:
            error = error * alpha.reciprocal().clamp(max=recipe.max_error_weight)
        loss: Tensor = error.mean() + recipe.slot_weight * slot_loss
        return loss

    trained = nn.ModuleList([denoiser, reader])
    Optimiser.of(recipe, trained, loss_of).descend(recipe.family, log)
    denoiser.requires_grad_(False)
    return denoiser


def _captions(
    input_ids: dict[str, Tensor],
    empty_ids: dict[str, Tensor],
    rows: Tensor,
    is_dropped: Tensor,
) -> dict[str, Tensor]:
    """Take one of each scene's captions, the same for all encoders, or none."""
    num_captions = next(iter(input_ids.values())).shape[1]
    which = _random(num_captions, len(rows), rows.device)
    return {
        name: torch.where(is_dropped[:, None], empty_ids[name], ids[rows, which]).long()
        for name, ids in input_ids.items()
    }


def _random(limit: int, count: int, device: torch.device) -> Tensor:
    return torch.randint(limit, (count,), device=device)


def _alphas(recipe: Recipe) -> Tensor:
    """alphas_cumprod (T,), as the samplers have them."""
    schedule = ScheduleConfig.from_dict(recipe.scheduler).for_sampler("ddim")
    return torch.from_numpy(alphas_cumprod(schedule)).float()
