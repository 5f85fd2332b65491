"""One way to optimise for all trainings: AdamW under a warm-up and a cosine, gradients clipped, and
a moving average of the weights. On a GPU the whole step is one CUDA graph."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, Self

import torch
from torch import Tensor, nn

MAX_GRADIENT = 1.0
LAST_RATE = 0.02
"""Learning rate at the end, as a part of the highest."""
WARM_UP_RUNS = 3
"""Of a step before it is captured, at a learning rate of 0."""
LOG_EVERY = 500
AVERAGE_EVERY = 10
"""Steps between two updates of the average."""


class Schedule(Protocol):
    """What a recipe says of a training's steps."""

    @property
    def num_steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def ema_decay(self) -> float: ...


class Optimiser:
    """Repeats a step: `loss_of` draws its own random rows, and its gradients move the weights.

    The networks are small, so that starting kernels one by one takes longer than running them: on
    CUDA a step is captured once and replayed, also its random numbers (torch's default generator).
    """

    def __init__(
        self,
        module: nn.Module,
        loss_of: Callable[[], Tensor],
        *,
        learning_rate: float,
        warmup_steps: int,
        num_steps: int,
        ema_decay: float | None = None,
        is_captured: bool = True,
    ) -> None:
        """`is_captured`: False for a `loss_of` that copies from the host, which no CUDA graph
        can."""
        self._parameters: list[Tensor] = [one for one in module.parameters() if one.requires_grad]
        self._average = [one.detach().clone() for one in self._parameters]
        self._ema_decay = ema_decay
        self._loss_of = loss_of
        self._highest_rate = learning_rate
        self._warmup_steps = warmup_steps
        self._num_steps = num_steps
        self._num_done = 0
        device = self._parameters[0].device
        self._rate = torch.zeros((), device=device)
        self._adamw = torch.optim.AdamW(
            self._parameters,
            lr=self._rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=device.type == "cuda",
            capturable=device.type == "cuda",
            foreach=None if device.type == "cuda" else False,
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss = torch.zeros((), device=device)
        if is_captured and device.type == "cuda":
            self._capture()

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        module: nn.Module,
        loss_of: Callable[[], Tensor],
        *,
        is_captured: bool = True,
    ) -> Self:
        """Build what a recipe says."""
        return cls(
            module,
            loss_of,
            learning_rate=schedule.learning_rate,
            warmup_steps=schedule.warmup_steps,
            num_steps=schedule.num_steps,
            ema_decay=schedule.ema_decay,
            is_captured=is_captured,
        )

    def step(self) -> Tensor:
        """Go one step down; return the loss before it, which stays on the device."""
        self._rate.fill_(self._highest_rate * self._share_of_rate())
        if self._graph is None:
            self._loss = self._run()
        else:
            self._graph.replay()
        self._num_done += 1
        if self._ema_decay is not None and self._num_done % AVERAGE_EVERY == 0:
            self._update_average(self._ema_decay)
        return self._loss

    def descend(self, name: str, log: Callable[[str], None]) -> None:
        """Go all the steps and put the averaged weights into the module."""
        for step in range(self._num_steps):
            loss = self.step()
            if (step + 1) % LOG_EVERY == 0:
                log(f"{name}: step {step + 1} of {self._num_steps}, loss {loss.item():.4f}")
        self.load_average()

    @torch.no_grad()
    def load_average(self) -> None:
        """Put the averaged weights into the module."""
        for average, weights in zip(self._average, self._parameters, strict=True):
            weights.copy_(average)

    def _run(self) -> Tensor:
        self._adamw.zero_grad(set_to_none=True)
        loss = self._loss_of()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT, foreach=True)
        self._adamw.step()
        return loss.detach()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self._adamw.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._run()

    @torch.no_grad()
    def _update_average(self, decay: float) -> None:
        # The first updates forget faster, or the average would remember the random start.
        num_updates = self._num_done // AVERAGE_EVERY
        decay = min(decay**AVERAGE_EVERY, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(self._average, self._parameters, 1 - decay)

    def _share_of_rate(self) -> float:
        step, warmup = self._num_done, self._warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, self._num_steps - warmup)
        return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 on CUDA; the CPU trains in float32."""
    if device.type == "cuda":
        # The cache of cast weights would tie one step's graph to the weights of another.
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    return nullcontext()
