"""mini-ltx2's text encoder, connectors and transformer, trained together on latents of clips."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.gemma_tokenizer import GemmaTokenizer
from raydiff.mini.ltx2.dataset import CHOICES
from raydiff.mini.ltx2.recipe import (
    CAPTIONS_PER_CLIP,
    CONNECTORS,
    GEMMA,
    LATENT_SIZE,
    MAX_TOKENS,
    NUM_AUDIO_TOKENS,
    TEXT_WIDTH,
    TRANSFORMER,
    Training,
)
from raydiff.mini.ltx2.scenes import FRAME_RATE
from raydiff.mini.optimise import Optimiser, autocast
from raydiff.models.ltx2.connectors import TextEmbeds
from raydiff.models.ltx2.rope import LatentSize, Rotations, rotations
from raydiff.models.ltx2.transformer import LTX2Context, LTX2Velocity
from raydiff.pipelines.ltx2.components import pack
from raydiff.pipelines.ltx2.modules import (
    build_connectors,
    build_text_encoder,
    build_transformer,
)
from raydiff.pipelines.save_ltx2 import gemma_config

CAPTION_DROPOUT = 0.1
"""How often a caption is left out, for guidance."""
FIRST_FRAME_SHARE = 0.15
"""How often the first latent frame is given, for img2vid."""
SHIFT = 2.0
"""Of noise levels towards 1: the schedule of a render lingers there too."""
AUDIO_WEIGHT = 0.5
READING_WEIGHT = 0.1
"""Of the text's own loss: its last embeddings are to say what the caption asks for."""
FIRST_TOKENS = LATENT_SIZE[1] * LATENT_SIZE[2]
"""Tokens of the first latent frame."""
AUDIO_CHOICES = ("shape", "direction")
"""What of a scene is heard."""


class Texts(NamedTuple):
    """Tokenized captions, and "" as the last."""

    input_ids: Tensor
    """(N + 1, MAX_TOKENS) int64, padded on the left."""
    attention_mask: Tensor
    """(N + 1, MAX_TOKENS) bool."""

    @classmethod
    def of(cls, tokenizer: GemmaTokenizer, captions: Sequence[str], device: torch.device) -> Self:
        """Tokenize captions."""
        tokens = tokenizer.encode([*captions, ""])
        arrays = (tokens.input_ids, tokens.attention_mask)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


class ClipDenoiser(nn.Module):
    """All that training moves; `readers` are of training alone."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(gemma_config(GEMMA, vocab_size))
        self.connectors = build_connectors(CONNECTORS)
        self.transformer = build_transformer(TRANSFORMER)
        self.readers = nn.ModuleDict(
            {name: nn.Linear(TEXT_WIDTH, len(choices)) for name, choices in CHOICES.items()}
        )
        self.audio_readers = nn.ModuleDict(
            {name: nn.Linear(TEXT_WIDTH, len(CHOICES[name])) for name in AUDIO_CHOICES}
        )
        self.requires_grad_(True)

    def embeds(self, input_ids: Tensor, attention_mask: Tensor) -> TextEmbeds:
        """Token ids (B, MAX_TOKENS), padded on the left -> (B, MAX_TOKENS, TEXT_WIDTH) each."""
        states = self.text_encoder(input_ids, attention_mask)
        embeds: TextEmbeds = self.connectors(states, attention_mask, MAX_TOKENS)
        return embeds

    def velocity(
        self,
        video: Tensor,
        audio: Tensor,
        embeds: TextEmbeds,
        turns: Rotations,
        sigmas: Tensor,
        is_given: Tensor,
    ) -> LTX2Velocity:
        """Noisy tokens at sigmas (B,) -> velocities; `is_given` (B,): the first frame is clean."""
        context = LTX2Context(
            rotations=turns,
            video_text=self.transformer.caption_projection(embeds.video),
            audio_text=self.transformer.audio_caption_projection(embeds.audio),
            text_rows=None,
            keys_values=(),
        )
        video_sigmas = sigmas[:, None].repeat(1, LATENT_SIZE[0])
        video_sigmas[:, 0] *= ~is_given
        velocity: LTX2Velocity = self.transformer(
            video, audio, context, sigmas=sigmas, video_sigmas=video_sigmas
        )
        return velocity

    def reading_loss(self, embeds: TextEmbeds, labels: Tensor, is_read: Tensor) -> Tensor:
        """How far the last embeddings are from saying `labels` (B, CHOICES), in rows (B,)."""
        names = list(CHOICES)
        losses = []
        for stream, readers in ((embeds.video, self.readers), (embeds.audio, self.audio_readers)):
            for index, (name, reader) in enumerate(readers.items()):
                logits = reader(stream[:, index - len(readers)]).float()
                loss = F.cross_entropy(logits, labels[:, names.index(name)], reduction="none")
                losses.append((loss * is_read).sum() / is_read.sum().clamp(min=1))
        return torch.stack(losses).sum()


def train_clip_denoiser(
    training: Training,
    *,
    video: Tensor,
    audio: Tensor,
    texts: "Texts",
    labels: Tensor,
    vocab_size: int,
    log: Callable[[str], None],
) -> ClipDenoiser:
    """Train from nothing on video (N, C, f, h, w) and audio (N, M, C'), both normalised, on the
    device where they are; `texts` has CAPTIONS_PER_CLIP of each clip, and "" after them.
    """
    torch.manual_seed(training.seed)
    device = video.device
    denoiser = ClipDenoiser(vocab_size).to(device)
    num_rows = training.batch_size
    # Once, and not in the step: it copies numbers to the device, which a CUDA graph cannot.
    turns = rotations(
        denoiser.transformer.config,
        LatentSize(*LATENT_SIZE),
        NUM_AUDIO_TOKENS,
        [FRAME_RATE],
        device,
    )

    def loss_of() -> Tensor:
        rows = torch.randint(len(video), (num_rows,), device=device)
        told = rows * CAPTIONS_PER_CLIP
        told = told + torch.randint(CAPTIONS_PER_CLIP, (num_rows,), device=device)
        is_told = torch.rand(num_rows, device=device) >= CAPTION_DROPOUT
        is_given = torch.rand(num_rows, device=device) < FIRST_FRAME_SHARE
        told = torch.where(is_told, told, len(texts.input_ids) - 1)
        times = torch.rand(num_rows, device=device)
        sigmas = SHIFT * times / (1 + (SHIFT - 1) * times)
        clean_video, clean_audio = pack(video[rows].float()), audio[rows].float()
        video_noise, audio_noise = torch.randn_like(clean_video), torch.randn_like(clean_audio)
        is_fixed = is_given[:, None] & (
            torch.arange(clean_video.shape[1], device=device) < FIRST_TOKENS
        )
        at = sigmas[:, None, None] * ~is_fixed[..., None]
        noisy_video = torch.lerp(clean_video, video_noise, at)
        noisy_audio = torch.lerp(clean_audio, audio_noise, sigmas[:, None, None])
        with autocast(device):
            embeds = denoiser.embeds(texts.input_ids[told], texts.attention_mask[told])
            velocity = denoiser.velocity(noisy_video, noisy_audio, embeds, turns, sigmas, is_given)
        video_error = (velocity.video.float() - (video_noise - clean_video)).square().mean(-1)
        video_error = (video_error * ~is_fixed).sum() / (~is_fixed).sum()
        audio_error = F.mse_loss(velocity.audio.float(), audio_noise - clean_audio)
        reading = denoiser.reading_loss(embeds, labels[rows], is_told)
        return video_error + AUDIO_WEIGHT * audio_error + READING_WEIGHT * reading

    Optimiser.of(training, denoiser, loss_of).descend("ltx2", log)
    denoiser.requires_grad_(False)
    return denoiser
