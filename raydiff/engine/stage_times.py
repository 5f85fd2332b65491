"""Which stages a worker's role has, and what each of them took of a batch."""

from raydiff.engine.messages import Role
from raydiff.request import RenderResult

STAGES = ("encode", "denoise", "decode", "write")
STAGES_OF_ROLE: dict[Role, tuple[str, ...]] = {
    "fused": STAGES,
    "encode": ("encode",),
    "denoise": ("denoise",),
    "denoise_decode": ("denoise", "decode", "write"),
    "decode": ("decode", "write"),
}


def stage_s(result: RenderResult, stage: str) -> float:
    """Return a row's share of its batch's seconds in a stage: the shares of all rows make the sum.

    0 where the row did not come so far.
    """
    seconds: float | None = getattr(result, f"{stage}_s")
    if seconds is None:
        return 0.0
    # A file is written for each row; what is before it is done for the batch as a whole.
    return seconds if stage == "write" else seconds / (result.batch_size or 1)
