"""One optimiser for all trainings: AdamW under a warm-up and a cosine, gradients clipped, and a
moving average of the weights."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

MAX_GRADIENT = 1.0
LAST_RATE = 0.02
"""Learning rate at the end, as a part of the highest."""


class Optimiser:
    """Steps a module's trainable parameters."""

    def __init__(
        self,
        module: nn.Module,
        learning_rate: float,
        warmup_steps: int,
        num_steps: int,
        *,
        ema_decay: float | None = None,
    ) -> None:
        self._parameters: list[Tensor] = [one for one in module.parameters() if one.requires_grad]
        self._average = [one.detach().clone() for one in self._parameters]
        self._ema_decay = ema_decay
        self._num_done = 0
        is_cuda = self._parameters[0].is_cuda
        self._adamw = torch.optim.AdamW(
            self._parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=is_cuda
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adamw, lambda step: _rate(step, warmup_steps, num_steps)
        )

    def step(self, loss: Tensor) -> None:
        """Go one step down the loss."""
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT, foreach=True)
        self._adamw.step()
        self._schedule.step()
        self._adamw.zero_grad(set_to_none=True)
        self._num_done += 1
        if self._ema_decay is not None:
            # The first steps' average forgets faster, or it would remember the random start.
            decay = min(self._ema_decay, (1 + self._num_done) / (10 + self._num_done))
            with torch.no_grad():
                torch._foreach_lerp_(self._average, self._parameters, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the module for the time being."""
        own = [one.detach().clone() for one in self._parameters]
        self.load_average()
        try:
            yield
        finally:
            _copy(own, self._parameters)

    def load_average(self) -> None:
        """Put the averaged weights into the module."""
        _copy(self._average, self._parameters)


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 on CUDA; the CPU trains in float32."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def _rate(step: int, warmup_steps: int, num_steps: int) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    for old, new in zip(source, target, strict=True):
        new.copy_(old)
