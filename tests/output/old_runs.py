"""Runs as older versions left them: metadata and run.json without what came later."""

import json
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from raydiff.output.metadata_schema import COLUMNS

Age = Literal["before clips", "before shards"]

NEW_COLUMNS: dict[Age, tuple[str, ...]] = {
    "before clips": (
        *("duration_s", "audio_sample_rate", "wav_sha256", "nfe", "num_frames", "frame_rate"),
        *(
            "video_mode",
            "text_encoder",
            "stg_scale",
            "stg_blocks",
            "modality_scale",
            "audio_guidance_scale",
        ),
        *("audio_stg_scale", "audio_modality_scale", "audio_guidance_rescale"),
    )
}
NEW_COLUMNS["before shards"] = (*NEW_COLUMNS["before clips"], "member", "offset", "num_threads")
OLD_OUTPUT = (
    *("image", "quality", "png_compression", "strip_metadata", "commit_s", "commit_rows"),
    *("format", "shard_rows", "shard_s"),
)
SHARD_OUTPUT = ("format", "shard_rows", "shard_s")


def make_old(out: Path, age: Age) -> Path:
    """Take out of the images' run in `out` what a version of that age did not write."""
    for part in (out / "metadata").glob("*.parquet"):
        table = pq.read_table(part)
        assert all(table[name].null_count == len(table) for name in NEW_COLUMNS["before clips"])
        old = table.drop_columns(list(NEW_COLUMNS[age]))
        assert set(old.column_names) < set(COLUMNS) | {"note"}
        pq.write_table(old, part)
    run = json.loads((out / "run.json").read_text())
    config = run["config"]
    del config["ltx2"]
    names = set(OLD_OUTPUT) - set(SHARD_OUTPUT if age == "before shards" else ())
    config["output"] = {name: config["output"][name] for name in names}
    defaults = config["defaults"]
    config["defaults"] = {name: defaults[name] for name in defaults if "stg" not in name}
    for name in ("modality_scale", "audio_guidance_scale", "audio_modality_scale"):
        del config["defaults"][name]
    del config["defaults"]["audio_guidance_rescale"]
    config["defaults"]["guidance_rescale"] = 0.0  # then a default of every run
    (out / "run.json").write_text(json.dumps(run))
    return out
