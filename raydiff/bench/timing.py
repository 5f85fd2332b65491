"""Seconds and peak memory of what a device does."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


def timed(run: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    """Return how long `run` takes until the GPU, if there is one, has done it, and its result."""
    started = _now()
    result = run(*arguments)
    return _now() - started, result


@contextmanager
def clean_gpu() -> Iterator[None]:
    """Start with an empty allocator and leave one behind, so that peaks are one renderer's."""
    _empty()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.compiler.reset()
        _empty()


def peak_vram_bytes() -> int | None:
    """Return the most that torch's allocator held since `clean_gpu`; None without a GPU."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


class ForwardTimer:
    """Adds up the seconds of a module's forward passes, and their rows, without waiting for the GPU
    in between."""

    def __init__(self, module: nn.Module, rows_of: Callable[[Any, Any], int]) -> None:
        """`rows_of` returns a pass's rows from its positional and named arguments."""
        self._module = module
        self._rows_of = rows_of
        self._marks: list[tuple[Any, Any]] = []
        self._begun: Any = None
        self.num_rows = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the passes that are run meanwhile."""

        def begin(module: nn.Module, arguments: Any, named: Any) -> None:
            self.num_rows += self._rows_of(arguments, named)
            self._begun = _mark()

        def end(module: nn.Module, arguments: Any, output: Any) -> None:
            self._marks.append((self._begun, _mark()))

        hooks = [
            self._module.register_forward_pre_hook(begin, with_kwargs=True),
            self._module.register_forward_hook(end),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def seconds(self) -> float:
        """Seconds of all passes so far."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return float(sum(begin.elapsed_time(end) for begin, end in self._marks) / 1000)
        return float(sum(end - begin for begin, end in self._marks))


def _mark() -> Any:
    if not torch.cuda.is_available():
        return perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def _empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
