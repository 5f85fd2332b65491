"""Manifests, prompt files and init images in an object store."""

import hashlib
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydiff.config import RunConfig
from raydiff.errors import ConfigError, ManifestError, RowError
from raydiff.manifest.init_images import find_init_image, read_init_image
from raydiff.manifest.reader import open_manifest
from raydiff.manifest.rows import read_rows
from raydiff.manifest.sources import open_source
from raydiff.object_storage import ObjectStorage
from tests.manifest.known_models import SDXL
from tests.s3_server import FaultyS3


@pytest.fixture
def storage(s3: FaultyS3) -> ObjectStorage:
    return ObjectStorage(s3.new_uri())


def parquet(rows: int, **columns: Any) -> bytes:
    sink = io.BytesIO()
    prompts = [f"prompt {row}" for row in range(rows)]
    pq.write_table(pa.table({"prompt": prompts, **columns}), sink, row_group_size=100)
    return sink.getvalue()


def png(seed: int) -> bytes:
    sink = io.BytesIO()
    pixels = hashlib.blake2b(bytes([seed]), digest_size=48).digest()
    Image.frombytes("RGB", (4, 4), pixels).save(sink, "PNG")
    return sink.getvalue()


def prompts(uri: str, start_row: int = 0) -> list[str]:
    manifest = open_manifest(uri)
    return [
        text for _, batch in manifest.batches(start_row) for text in batch["prompt"].to_pylist()
    ]


def test_a_file_a_folder_and_a_glob_are_read(storage: ObjectStorage, s3: FaultyS3) -> None:
    for name in ("in/b.parquet", "in/a.parquet", "in/deep/c.parquet"):
        storage.put(name, parquet(250))
    storage.put("in/_SUCCESS", b"")
    texts = [f"prompt {row}" for row in range(250)]
    assert prompts(f"{storage.uri}/in/a.parquet") == texts
    s3.faults = ["503", "500", "reset"]
    assert prompts(f"{storage.uri}/in/a.parquet", start_row=230) == texts[230:]
    assert prompts(f"{storage.uri}/in") == texts * 3
    assert prompts(f"{storage.uri}/in/*.parquet") == texts * 2
    assert prompts(f"{storage.uri}/in/**/*.parquet") == texts * 3


def test_a_remote_manifest_is_known_like_a_local_one(
    storage: ObjectStorage, tmp_path: Path
) -> None:
    data = parquet(30, note=["x"] * 30)
    storage.put("m.parquet", data)
    (tmp_path / "m.parquet").write_bytes(data)
    remote, local = (open_manifest(f"{place}/m.parquet") for place in (storage.uri, tmp_path))
    assert remote.fingerprint == local.fingerprint
    assert remote.schema == local.schema
    assert (remote.folder, local.folder) == (storage.uri, tmp_path)


def test_prompt_files_are_read(storage: ObjectStorage) -> None:
    storage.put("p.txt", b"a fox\nan owl\n")
    storage.put("p.csv", b"prompt,seed\na fox,3\n")
    (batch,) = (batch for _, batch in open_source(f"{storage.uri}/p.txt").batches())
    assert batch["prompt"].to_pylist() == ["a fox", "an owl"]
    (batch,) = (batch for _, batch in open_source(f"{storage.uri}/p.csv").batches())
    assert batch.to_pylist() == [{"prompt": "a fox", "seed": 3}]


def test_what_is_not_there_is_named(storage: ObjectStorage) -> None:
    storage.put("empty/x.txt", b"")
    for name, said in [
        ("none.parquet", "does not exist"),
        ("empty", "is a folder without .parquet files: it has 1 other files"),
        ("empty/*.parquet", "matches no file"),
    ]:
        with pytest.raises(ManifestError, match=said):
            open_manifest(f"{storage.uri}/{name}")
    with pytest.raises(ManifestError, match="NoSuchBucket"):
        open_manifest("s3://none/m.parquet")
    with pytest.raises(ConfigError, match="given with credentials"):
        open_manifest(f"{storage.uri}/m.parquet?access_key=x&secret_key=y")


def test_an_init_image_is_found_and_known_by_its_content(
    storage: ObjectStorage, s3: FaultyS3
) -> None:
    storage.put("in/a.png", png(1))
    uri = f"{storage.uri}/in/a.png"
    s3.faults = ["500"]
    for text in ("in/a.png", uri):
        assert find_init_image(text, storage.uri) == (uri, hashlib.sha256(png(1)).hexdigest())
    s3.requests.clear()
    image = read_init_image(uri)
    assert (image.size, image.mode) == ((4, 4), "RGB")
    assert s3.requests == [], "what was just hashed is read from memory"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("none.png", "No such file|404|NotFound"),
        ("bad.png", "is not an intact PNG, JPEG or WebP image"),
        ("../secret.png", "is not a name below the input root s3://"),
        ("in/../../secret.png", "is not a name below"),
        ("/etc/passwd", "is not a name below"),
        ("s3://other/a.png", "is not a name below"),
        ("https://x.org/a.png", "is not a name below"),
        ("file:///etc/a.png", "is not a name below"),
        ("", "is not a name below"),
    ],
)
def test_an_init_image_that_cannot_be_used_costs_its_row_alone(
    text: str, said: str, storage: ObjectStorage
) -> None:
    storage.put("bad.png", png(2)[:40])
    with pytest.raises(RowError, match=said):
        find_init_image(text, storage.uri)


def test_rows_take_init_images_from_the_manifests_own_folder(storage: ObjectStorage) -> None:
    storage.put("m.parquet", parquet(2, init_image=["a.png", "none.png"]))
    storage.put("a.png", png(3))
    storage.put("elsewhere/a.png", png(9))
    find_init_image("elsewhere/a.png", storage.uri)
    storage.put("elsewhere/a.png", png(4))  # Replaced before the run begins.
    manifest = open_manifest(f"{storage.uri}/m.parquet")
    for root, seed in [(None, 3), (f"{storage.uri}/elsewhere", 4)]:
        config = RunConfig.model_validate({"input": {"root": root}, "model": {"name": "sdxl"}})
        good, bad = read_rows(manifest, config=config, models=lambda name: SDXL)
        assert good.request is not None
        assert good.request.init_image == f"{root or storage.uri}/a.png"
        assert good.request.init_image_sha256 == hashlib.sha256(png(seed)).hexdigest()
        assert bad.request is None
        assert "none.png" in str(bad.error)
