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


def stage_shares(result: RenderResult) -> tuple[float, float, float, float]:
    """Return a row's share of its batch's seconds in each of STAGES, 0 where it never came to.

    The shares of a batch's rows make the batch's seconds.
    """
    size = result.batch_size or 1
    return (
        (result.encode_s or 0.0) / size,
        (result.denoise_s or 0.0) / size,
        (result.decode_s or 0.0) / size,
        result.write_s or 0.0,  # each row has a file; what is before that is the whole batch's
    )
