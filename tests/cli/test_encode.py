"""`raydiff encode` and `raydiff encode-server`: texts encoded ahead of a run or elsewhere, and runs
that take them from there: the same files, and a missing text costs its own row alone."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from raydiff.cli import main
from raydiff.config import MemoryConfig, ModelConfig, RunConfig, load_config
from raydiff.engine.known_models import known_models
from raydiff.engine.messages import EncodeBatch, Role, TextKey, texts_of
from raydiff.engine.plan import open_rows
from raydiff.engine.render import RENDERER, renderer_arguments
from raydiff.engine.renderers import PipelineRenderer
from raydiff.engine.worker import Worker, WorkerSpec
from raydiff.errors import ModelError
from raydiff.manifest.rows import read_rows
from raydiff.output.run_file import start_run
from raydiff.pipelines.encoder_client import TOKEN_VARIABLE
from raydiff.pipelines.encoder_server import EncoderServer, serve_encoder
from raydiff.pipelines.load import load_pipeline
from raydiff.pipelines.tiny import make_tiny
from raydiff.request import RenderBatch, RenderResult, batch_key
from tests.pipelines.encoder_services import TOKEN, encoder_service

PROMPTS = ("a red cat", "a blue dog")
SMALL = {
    "defaults.height": 64,
    "defaults.width": 96,
    "defaults.num_frames": 9,
    "defaults.num_inference_steps": 1,
    "defaults.seed": 1,
    "output.strip_metadata": True,
}


@pytest.fixture(scope="module")
def tiny_ltx2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("ltx2", tmp_path_factory.mktemp("models") / "ltx2")


@pytest.fixture(scope="module")
def encoded(tiny_ltx2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the texts of PROMPTS and of rows without a negative prompt."""
    folder = tmp_path_factory.mktemp("texts")
    run("encode", *prompts(PROMPTS), "--model", tiny_ltx2, "--out", folder)
    return folder


def run(*arguments: str | Path, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def prompts(texts: tuple[str, ...]) -> list[str]:
    return [word for text in texts for word in ("--prompt", text)]


def summary(*arguments: str | Path, status: int = 0) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(run("encode", *arguments, "--json", status=status).stdout)
    return values


# raydiff encode


def test_each_text_of_a_manifest_is_encoded_once(tiny_ltx2: Path, tmp_path: Path) -> None:
    rows = {
        "prompt": ["a red cat", "a blue dog", "a red cat", "a bad row"],
        "negative_prompt": ["a photo", None, "a photo", None],
        "height": [512, 512, 512, 500],
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    command = (tmp_path / "rows.parquet", "--model", tiny_ltx2, "--out", tmp_path / "new" / "texts")
    limited = summary(*command, "--limit", "1")
    assert [limited[name] for name in ("num_texts", "num_encoded", "num_kept")] == [2, 2, 0]
    result = run("encode", *command, status=1)
    assert result.stdout.startswith("4 texts: 2 encoded, 2 were there; ")
    assert "row 3: height is 500" in result.stderr
    assert len(list((tmp_path / "new" / "texts").rglob("*.safetensors"))) == 4
    again = summary(*command, status=1)
    assert [again[name] for name in ("num_encoded", "num_kept", "num_bad")] == [0, 4, 1]


def test_a_damaged_file_is_made_anew(tiny_ltx2: Path, tmp_path: Path) -> None:
    command = (*prompts(PROMPTS), "--model", tiny_ltx2, "--out", tmp_path)
    summary(*command)
    file = min(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    assert [summary(*command)["num_encoded"] for _ in range(2)] == [1, 0]


def test_a_jobs_own_folder_is_filled_whatever_its_run_reads(
    tiny_ltx2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = {
        "prompts": ["a red cat"],
        "model": {"name": str(tiny_ltx2)},
        "ltx2": {"mode": "distilled", "text_encoder": "precomputed", "embeds": "texts"},
    }
    Path("job.yaml").write_text(json.dumps(job), encoding="utf-8")
    # Distilled checkpoints take no guidance, so that there is no negative prompt.
    assert summary("job.yaml")["num_texts"] == 1
    assert len(list(Path("texts").rglob("*.safetensors"))) == 1


def test_a_split_run_of_images_begins_with_the_texts_that_are_there(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    run("encode", "--prompt", "a red cat", "--model", tiny_sdxl, "--out", tmp_path / "out")
    config = load_config(
        overrides={"model.name": str(tiny_sdxl), "out": str(tmp_path / "out")}
        | {"engine.embeds_on_disk": True, "prompts": ["a red cat"]}
    )
    about = {"manifest_uri": "", "manifest_fingerprint": "0", "num_rows": 1}
    with start_run(str(tmp_path / "out"), config=config, models={}, **about):  # type: ignore[arg-type]
        encoder = PipelineRenderer(**renderer_arguments(config, None), role="encode")
        info = known_models(config.model)(str(tiny_sdxl))
        keys = [TextKey(info.name, info.revision, text) for text in ("a red cat", "")]
        assert encoder.encode(keys).num_from_disk == 2


def test_a_folder_is_asked_for_and_has_to_be_writable(tiny_ltx2: Path, tmp_path: Path) -> None:
    asked = run("encode", "--prompt", "a", "--model", tiny_ltx2, status=2)
    assert "--out FOLDER" in asked.stderr
    (tmp_path / "file").write_text("x", encoding="utf-8")
    command = ("encode", "--prompt", "a", "--model", tiny_ltx2, "--out")
    assert "cannot be made" in run(*command, tmp_path / "file" / "texts", status=2).stderr
    (tmp_path / "embeds").write_text("x", encoding="utf-8")
    assert "goes on from there" in run(*command, tmp_path, status=1).stderr


# Runs that read them.


def settings(model: Path, texts: tuple[str, ...], **values: Any) -> RunConfig:
    ltx2 = {f"ltx2.{name}": value for name, value in values.items()}
    return load_config(overrides={"model.name": str(model), "prompts": texts, **SMALL, **ltx2})


def batch_of(config: RunConfig) -> RenderBatch:
    rows = list(read_rows(open_rows(config), config=config, models=known_models(config.model)))
    requests = tuple(row.request for row in rows if row.request is not None)
    assert len(requests) == len(rows), [row.error for row in rows]
    return RenderBatch(batch_id=0, key=batch_key(requests[0]), requests=requests)


def worker(config: RunConfig, out: Path, role: Role = "fused") -> Worker:
    out.mkdir(exist_ok=True)
    return Worker(
        "w",
        WorkerSpec(
            renderer=RENDERER,
            arguments=renderer_arguments(config, None),
            role=role,
            out=str(out),
            output=config.output,
            batch_size=1,
        ),
    )


def render(config: RunConfig, out: Path) -> dict[str, RenderResult]:
    """Render in one worker; return each prompt's result."""
    batch = batch_of(config)

    async def fused() -> tuple[RenderResult, ...]:
        one = worker(config, out)
        await one.start()
        return (await one.render(batch)).results

    return by_prompt(batch, asyncio.run(fused()))


def render_split(config: RunConfig, out: Path) -> dict[str, RenderResult]:
    """Render with the texts encoded in a worker of their own."""
    batch = batch_of(config)
    texts = tuple(dict.fromkeys(text for request in batch.requests for text in texts_of(request)))

    async def split() -> tuple[RenderResult, ...]:
        encoder, renderer = worker(config, out, "encode"), worker(config, out, "denoise_decode")
        await encoder.start()
        _, *embeds = await encoder.encode(EncodeBatch(encode_id=0, texts=texts))
        await renderer.start()
        return (await renderer.render_encoded(batch, texts, *embeds)).results

    return by_prompt(batch, asyncio.run(split()))


def by_prompt(batch: RenderBatch, results: tuple[RenderResult, ...]) -> dict[str, RenderResult]:
    prompt_of = {request.request_id: request.prompt for request in batch.requests}
    return {prompt_of[result.request_id]: result for result in results}


def files(results: dict[str, RenderResult]) -> dict[str, str | None]:
    """Return the hash of each prompt's file."""
    assert {result.status for result in results.values()} == {"completed"}
    return {prompt: result.sha256 for prompt, result in results.items()}


@pytest.fixture(scope="module")
def expected(tiny_ltx2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Return the files that the checkpoint's own encoder leads to."""
    return files(render(settings(tiny_ltx2, PROMPTS), tmp_path_factory.mktemp("gemma3")))


def test_every_backend_leads_to_the_same_files(
    tiny_ltx2: Path, encoded: Path, expected: dict[str, str | None], tmp_path: Path
) -> None:
    assert len(set(expected.values())) == len(PROMPTS)
    config = settings(tiny_ltx2, PROMPTS, text_encoder="precomputed", embeds=str(encoded))
    assert files(render(config, tmp_path / "fused")) == expected
    assert files(render_split(config, tmp_path / "split")) == expected
    with encoder_service(load_pipeline(str(tiny_ltx2), stages=["encode"])) as server:
        values = {"encoder_url": server.url, "encoder_hosts": ["127.0.0.1"]}
        config = settings(tiny_ltx2, PROMPTS, text_encoder="api", **values)
        assert files(render(config, tmp_path / "api")) == expected


def test_a_text_that_is_not_there_costs_its_own_row_alone(
    tiny_ltx2: Path, encoded: Path, expected: dict[str, str | None], tmp_path: Path
) -> None:
    texts = (PROMPTS[0], "an unknown text", PROMPTS[1])
    config = settings(tiny_ltx2, texts, text_encoder="precomputed", embeds=str(encoded))
    results = render(config, tmp_path)
    failed = results.pop("an unknown text")
    assert failed.status == "failed"
    assert '"an unknown text" is not among the encoded texts' in str(failed.error)
    assert files(results) == expected


def test_noise_is_no_secret(
    tiny_ltx2: Path, expected: dict[str, str | None], tmp_path: Path
) -> None:
    results = render(settings(tiny_ltx2, PROMPTS, text_encoder="random"), tmp_path)
    assert {str(result.warning) for result in results.values()} == {
        "its text was not read: ltx2.text_encoder is random"
    }
    assert not set(files(results).values()) & set(expected.values())
    again = render_split(settings(tiny_ltx2, PROMPTS, text_encoder="random"), tmp_path / "again")
    assert files(again) == files(results)
    assert all("was not read" in str(result.warning) for result in again.values())


# raydiff encode-server


@pytest.fixture
def serving(tiny_ltx2: Path, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Start the command; return its process and its first line."""
    (tmp_path / "token").write_text(f"{TOKEN}\n", encoding="utf-8")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "raydiff", "encode-server", "--model", tiny_ltx2),
            *("--port", "0", "--token-file", tmp_path / "token"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_the_server_answers_until_a_signal_ends_it_at_once(
    serving: tuple["subprocess.Popen[str]", str],
    tiny_ltx2: Path,
    expected: dict[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, line = serving
    url, _, about = line.partition(" encodes for ")
    revision = known_models(settings(tiny_ltx2, ()).model)(str(tiny_ltx2)).revision
    assert about.strip() == f"{tiny_ltx2}, revision {revision}, float32"
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    values = {"encoder_url": url, "encoder_hosts": ["127.0.0.1"]}
    config = settings(tiny_ltx2, PROMPTS[:1], text_encoder="api", **values)
    assert files(render(config, tmp_path / "out")) == {PROMPTS[0]: expected[PROMPTS[0]]}
    os.kill(process.pid, signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(timeout=30) == -signal.SIGTERM
    assert time.monotonic() - started < 5
    assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]


def test_the_server_asks_for_a_token_or_says_that_it_does_not(
    tiny_ltx2: Path, tiny_sd21: Path, tmp_path: Path
) -> None:
    command = ("encode-server", "--model", tiny_ltx2)
    assert "one of them" in run(*command, status=2).stderr
    token = ("--token-file", tmp_path / "token")
    assert "one of them" in run(*command, *token, "--insecure", status=2).stderr
    assert "cannot be read" in run(*command, *token, status=2).stderr
    everyone = run(*command, "--insecure", "--host", "0.0.0.0", status=2)
    assert "anyone who reaches this machine" in everyone.stderr
    images = ModelConfig(name=str(tiny_sd21))
    with (
        EncoderServer("127.0.0.1", 0, token=None) as server,
        pytest.raises(ModelError, match="this is sd21; only LTX-2's workers ask"),
    ):
        serve_encoder(server, model=images, memory=MemoryConfig(), on_ready=print)
