"""README.md of an export: a dataset card as the Hugging Face Hub reads it."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import yaml

from raydiff import __version__

MEDIA_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MEDIA_NAMES = ("image", "video")
"""Columns of MEDIA_TYPE that hold what their name says."""
DTYPES = {
    "halffloat": "float16",
    "float": "float32",
    "double": "float64",
    "date32[day]": "date32",
    "date64[ms]": "date64",
}
"""Arrow's names of types that `datasets` calls otherwise."""
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)


def dataset_card(
    *,
    title: str,
    loading: str,
    paths: Mapping[str, str],
    num_samples: Mapping[str, int],
    num_bytes: Mapping[str, int],
    file_bytes: int,
    schema: pa.Schema | None,
) -> bytes:
    """Return the card. `paths` are the files of each split; `schema` is that of Parquet files.

    num_bytes is what the images of each split take, file_bytes what all files take.
    """
    total = sum(num_samples.values())
    front: dict[str, Any] = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": path} for split, path in paths.items()],
            }
        ],
        "size_categories": [next((name for limit, name in SIZES if total < limit), "n>1B")],
        "tags": ["synthetic", "raydiff"],
    }
    if schema is not None:
        front["dataset_info"] = _info(schema, num_samples, num_bytes, file_bytes)
    lines = [f"- {split}: {num_samples[split]:,} samples" for split in paths]
    text = "\n".join(
        [
            f"# {title}",
            "",
            f"{total:,} samples, rendered and exported by raydiff {__version__}.",
            "",
            *lines,
            "",
            "```python",
            loading,
            "```",
            "",
        ]
    )
    # Every text is quoted as YAML needs it, also a split that is called `no` or `1`.
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{text}".encode()


def _info(
    schema: pa.Schema,
    num_samples: Mapping[str, int],
    num_bytes: Mapping[str, int],
    file_bytes: int,
) -> dict[str, Any]:
    return {
        "features": [{"name": field.name, **_feature(field)} for field in schema],
        "splits": [
            {"name": split, "num_bytes": num_bytes[split], "num_examples": num_samples[split]}
            for split in num_samples
        ],
        "download_size": file_bytes,
        "dataset_size": sum(num_bytes.values()),
    }


def _feature(field: pa.Field) -> dict[str, Any]:
    """Return a column's type in the card's words."""
    dtype = field.type
    if dtype == MEDIA_TYPE and field.name in MEDIA_NAMES:
        return {"dtype": field.name}
    if pa.types.is_struct(dtype):
        return {"struct": [{"name": one.name, **_feature(one)} for one in dtype]}
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype):
        item = _feature(dtype.value_field)
        return {"list": next(iter(item.values())) if item.keys() != {"list"} else item}
    return {"dtype": DTYPES.get(str(dtype), str(dtype))}
