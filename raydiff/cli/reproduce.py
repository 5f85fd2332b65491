"""`raydiff reproduce`: render one image or clip of a run again from its metadata, and compare."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from raydiff.engine.rerender import Rerendered


@click.command()
@click.argument("out", type=click.Path())
@click.argument("request_id")
@click.option("--to", type=click.Path(path_type=Path), help="Write the new file here.")
@click.option("--model", type=click.Path(), help="Where the run's model is now, if it moved.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def reproduce(out: str, request_id: str, to: Path | None, model: str | None, is_json: bool) -> None:
    """Render REQUEST_ID of the run in OUT again and compare it with the run's own file.

    From the metadata alone: the model at its recorded revision, the request's fields, dtype,
    memory profile and batch size. REQUEST_ID may be cut short where no other begins so. Exit
    status 0 when the bytes are equal, 1 when they differ, 2 when it cannot be made again.

    \b
    raydiff reproduce renders 3f2a9c01
    raydiff reproduce renders 3f2a9c01 --to again.png
    """
    from raydiff.engine.rerender import Rerenderer
    from raydiff.errors import ConfigError
    from raydiff.output.atomic import written_whole
    from raydiff.output.media_files import is_frames_index
    from raydiff.output.row_samples import find_request

    row = find_request(out, request_id)
    if to is not None and is_frames_index(str(row["file_name"])):
        raise ConfigError(
            f"--to {to}: {row['file_name']} is a folder of frames, and this a single file. Leave "
            "--to out."
        )
    made = Rerenderer(out, model=model).render(row)
    if to is not None:
        with written_whole(to) as temporary:
            temporary.write_bytes(made.data)
    click.echo(json.dumps(rerendered_values(made)) if is_json else describe_rerendered(made))
    sys.exit(0 if made.is_equal else 1)


def describe_rerendered(made: "Rerendered") -> str:
    """Say how a new file compares with the old one, in one line."""
    name = f"row {made.row_index}: {made.file_name}"
    if made.is_equal:
        return f"{name}: equal, byte for byte"
    if made.similarity is None:
        found = "the same frames"
    elif made.similarity.is_equal:
        found = "the same pixels in other bytes; the encoder is another version"
    else:
        found = f"up to {made.max_abs} of 255 off, PSNR {made.similarity.psnr:.1f} dB"
    if made.sound_snr != math.inf:
        found += f"; the sound {_describe_sound(made.sound_snr)}"
    if made.device != made.recorded_device:
        found += f"; it was rendered on {made.recorded_device}, now on {made.device}"
    return f"{name}: {found}"


def _describe_sound(snr: float) -> str:
    return "is missing or of another length" if snr == -math.inf else f"differs, SNR {snr:.1f} dB"


def rerendered_values(made: "Rerendered") -> dict[str, Any]:
    """Return how a new file compares with the old one, for JSON."""
    similarity = made.similarity
    return {
        "row_index": made.row_index,
        "request_id": made.request_id,
        "file_name": made.file_name,
        "is_equal": made.is_equal,
        "sha256": made.sha256,
        "recorded_sha256": made.recorded_sha256,
        "max_abs": made.max_abs,
        "psnr": None if similarity is None or similarity.is_equal else similarity.psnr,
        "sound_snr": made.sound_snr if math.isfinite(made.sound_snr) else None,
        "device": made.device,
        "recorded_device": made.recorded_device,
    }
