"""`raydiff bench`: measure the models on a GPU and the engine on any machine."""

import json
import sys
import tempfile
from dataclasses import asdict
from typing import Any

import click

MIB = 1024**2
GIB = 1024**3


@click.group()
def bench() -> None:
    """Measure the engine and the models on this machine.

    \b
    raydiff bench engine
    raydiff bench chaos
    raydiff bench model sdxl
    """


@bench.command("engine")
@click.option("--rows", default=20_000, show_default=True)
@click.option("--row-ms", default=1.0, show_default=True, help="Time that a row takes.")
@click.option("--workers", default=2, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["files", "webdataset"]),
    default="files",
    show_default=True,
)
@click.option("--out", help="New folder to write to; the default is a temporary one.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def bench_engine(
    rows: int,
    row_ms: float,
    workers: int,
    batch_size: int,
    output_format: str,
    out: str | None,
    is_json: bool,
) -> None:
    """Run rows without a model through driver, Ray, writer and ledger: rows/s and memory.

    Its overhead is the share of the workers' time that does not go into rows, starts and the
    run's end left out.

    \b
    raydiff bench engine
    raydiff bench engine --row-ms 50 --workers 8 --rows 6000
    raydiff bench engine --rows 1000000
    """
    from raydiff.bench.engine import bench_engine as run

    with tempfile.TemporaryDirectory(prefix="raydiff-bench-") as folder:
        report = run(
            num_rows=rows,
            out=out or f"{folder}/out",
            num_workers=workers,
            batch_size=batch_size,
            row_ms=row_ms,
            output_format=output_format,
        )
    if is_json:
        click.echo(json.dumps(asdict(report) | {"rss_growth_bytes": report.rss_growth_bytes}))
        return
    overhead = "" if report.overhead is None else f"overhead {report.overhead:.1%}; "
    click.echo(
        f"{report.rows_per_s:,.0f} rows/s ({rows:,} rows of {row_ms:g} ms, {workers} workers, "
        f"batches of {batch_size}); {overhead}driver memory {report.rss_last_bytes / MIB:.0f} MiB, "
        f"{report.rss_growth_bytes / MIB:+.0f} MiB since row 10,000"
    )


@bench.command("ledger")
@click.option("--rows", default=10_000_000, show_default=True)
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def bench_ledger(rows: int, is_json: bool) -> None:
    """Generate a run of many rows, and measure resume, plan and status on it.

    Exit status 1 when one takes more than 30 s or 1 GB, or counts wrong.

    \b
    raydiff bench ledger
    raydiff bench ledger --rows 1000000
    """
    from raydiff.bench.ledger import bench_ledger as run

    def say(step: str) -> None:
        click.echo(f"{step} ...", err=True)

    with tempfile.TemporaryDirectory(prefix="raydiff-bench-") as folder:
        report = run(num_rows=rows, folder=folder, on_step=say)
    if is_json:
        click.echo(json.dumps(asdict(report) | {"is_good": report.is_good}))
    else:
        click.echo(
            f"{rows:,} rows in {report.num_parts} parts, {report.ledger_bytes / MIB:,.0f} MiB; "
            f"the last part, of {report.num_torn} rows, is torn"
        )
        for one in report.measurements:
            click.echo(
                f"{one.name:<20} {one.wall_s:6.1f} s, {one.cpu_s:.1f} of CPU  "
                f"{one.peak_rss_bytes / MIB:5.0f} MiB  {one.num_done:,} rows done"
                + ("" if one.is_good else "  NOT as it must be")
            )
    sys.exit(0 if report.is_good else 1)


@bench.command("chaos")
@click.option("--rows", default=4000, show_default=True)
@click.option("--nodes", default=3, show_default=True)
@click.option("--workers", default=6, show_default=True)
@click.option("--row-ms", default=50.0, show_default=True, help="Time that a row takes.")
@click.option("--runs", default=3, show_default=True)
@click.option("--split", is_flag=True, help="Encode, denoise and decode on workers of their own.")
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object per run.")
def bench_chaos(
    rows: int, nodes: int, workers: int, row_ms: float, runs: int, split: bool, is_json: bool
) -> None:
    """Run rows on a Ray cluster of several nodes on this machine, and kill all the time.

    A random worker dies each second, then a node, then the driver, which is started again; 5 rows
    are bad, and 2 kill their worker. Exit status 1 where a row is lost or done twice, or more than
    15 % are rendered twice.

    \b
    raydiff bench chaos
    raydiff bench chaos --rows 800 --runs 1 --split
    """
    from raydiff.bench.chaos import ChaosJob, run_chaos

    job = ChaosJob(
        num_rows=rows, num_nodes=nodes, num_workers=workers, row_ms=row_ms, is_split=split
    )
    is_good = True
    for report in run_chaos(job, runs, on_step=lambda step: click.echo(f"{step} ...", err=True)):
        is_good = is_good and report.is_good
        if is_json:
            values = {"extra": report.extra, "is_good": report.is_good}
            click.echo(json.dumps(asdict(report) | values))
            continue
        click.echo(
            f"{'good' if report.is_good else 'NOT good'}: {report.completed:,} completed, "
            f"{report.failed} failed, {report.quarantined} quarantined of {report.num_rows:,}; "
            f"{report.num_missing} missing, {report.num_twice} twice; {report.num_killed} workers "
            f"killed, {report.extra:.1%} rendered again; {report.elapsed_s:.0f} s"
        )
        for problem in report.problems:
            click.echo(f"  {problem}")
    sys.exit(0 if is_good else 1)


@bench.command("model")
@click.argument("family", type=click.Choice(["sd21", "sdxl"]))
@click.option("--mode", "modes", multiple=True, type=click.Choice(["eager", "compiled"]))
@click.option("--batch-size", default=8, show_default=True)
@click.option("--size", type=int, help="Height and width; the default is the model's own.")
@click.option("--steps", default=30, show_default=True)
@click.option("--guidance-scale", default=5.0, show_default=True)
@click.option("--batches", default=3, show_default=True, help="Counted batches of each kind.")
@click.option(
    "--profile",
    type=click.Choice(["full_gpu", "balanced", "gpu_poor", "extreme"]),
    default="full_gpu",
    show_default=True,
    help="Memory profile of raydiff's side.",
)
@click.option("--peer/--no-peer", default=True, help="Measure diffusers beside it.")
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object per line.")
def bench_model(
    family: str,
    modes: tuple[Any, ...],
    batch_size: int,
    size: int | None,
    steps: int,
    guidance_scale: float,
    batches: int,
    profile: Any,
    peer: bool,
    is_json: bool,
) -> None:
    """Render full-size FAMILY models with random weights on the GPU, in bfloat16.

    \b
    raydiff bench model sdxl
    raydiff bench model sd21 --mode compiled --batch-size 16
    """
    from raydiff.bench.model import NATIVE_SIZE, Job, bench_model

    job = Job(
        family=family,
        batch_size=batch_size,
        size=size or NATIVE_SIZE[family],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        num_batches=batches,
        profile=profile,
    )
    for result in bench_model(job, modes or ("eager", "compiled"), has_peer=peer):
        if is_json:
            click.echo(json.dumps(asdict(result)))
            continue
        stages = ", ".join(
            f"{name} {seconds:.3f} s"
            for name, seconds in (
                ("encode", result.encode_s),
                ("denoise", result.denoise_s),
                ("decode", result.decode_s),
            )
            if seconds is not None
        )
        click.echo(
            f"{result.renderer:<9} {family} {result.mode:<8} "
            f"{result.images_per_s:6.3f} images/s  {stages}  "
            f"{result.unet_tflop_per_s:.0f} TFLOP/s  peak {result.peak_vram_bytes / GIB:.1f} GiB  "
            f"first batch {result.warm_up_s:.0f} s"
        )


@bench.command("video")
@click.option("--version", type=click.Choice(["2.0", "2.3"]), default="2.0", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="8 without guidance, 40 with it.")
@click.option(
    "--guidance",
    type=click.Choice(["none", "cfg", "full"]),
    help="cfg: negative prompts. full: and perturbed, and streams apart. Without --steps and this, "
    "8 steps of none, then 40 of cfg.",
)
@click.option("--batch-size", default=1, show_default=True)
@click.option("--height", type=int, help="512, or 64 of the tiny network.")
@click.option("--width", type=int, help="768, or 96.")
@click.option("--frames", type=int, help="121, or 9.")
@click.option("--batches", default=1, show_default=True, help="Counted batches of each kind.")
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp8"]),
    default="bf16",
    show_default=True,
    help="Of raydiff's transformer.",
)
@click.option(
    "--compile/--no-compile",
    "is_compiled",
    default=None,
    help="Compile the transformer's blocks, both renderers'; not those of the tiny network.",
)
@click.option("--peer/--no-peer", default=True, help="Measure diffusers, if it is installed.")
@click.option("--tiny", "is_tiny", is_flag=True, help="A tiny network, which a CPU can run.")
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object per line.")
def bench_video(
    version: Any,
    steps: int | None,
    guidance: Any,
    batch_size: int,
    height: int | None,
    width: int | None,
    frames: int | None,
    batches: int,
    dtype: Any,
    is_compiled: bool | None,
    peer: bool,
    is_tiny: bool,
    is_json: bool,
) -> None:
    """Make clips with a full-size LTX-2 of random weights, from prompts to MP4 files with sound.

    With --dtype fp8 its transformer is put into fp8 in memory, and compared with bf16.

    \b
    raydiff bench video
    raydiff bench video --steps 40 --guidance full --dtype fp8
    raydiff bench video --tiny
    """
    from raydiff.bench.video import bench_video as run
    from raydiff.bench.video_job import Scene, samplings

    scene = Scene(
        version=version,
        is_tiny=is_tiny,
        height=height or (64 if is_tiny else 512),
        width=width or (96 if is_tiny else 768),
        num_frames=frames or (9 if is_tiny else 121),
        batch_size=batch_size,
        num_batches=batches,
        dtype=dtype,
        is_compiled=not is_tiny if is_compiled is None else is_compiled,
    )
    for result in run(scene, samplings(steps, guidance), has_peer=peer):
        click.echo(json.dumps(asdict(result)) if is_json else _video_line(result))


def _video_line(result: Any) -> str:
    stages = ", ".join(
        f"{name} {seconds:.2f} s"
        for name, seconds in (
            ("encode", result.encode_s),
            ("denoise", result.denoise_s),
            ("decode", result.decode_s),
            ("write", result.write_s),
        )
        if seconds is not None
    )
    parts = [
        f"{result.renderer:<9} LTX-{result.version} {result.dtype} "
        f"{'compiled' if result.is_compiled else 'eager':<8} {result.num_inference_steps} steps, "
        f"guidance {result.guidance}, {result.nfe} NFE, batch {result.batch_size}",
        f"{result.total_s:.2f} s: {stages}",
        f"step {result.step_s:.3f} s, forward {result.forward_s:.3f} s per clip, "
        f"{result.transformer_tflop_per_s:.0f} TFLOP/s",
    ]
    if result.peak_vram_bytes is not None:
        parts.append(f"peak {result.peak_vram_bytes / GIB:.1f} GiB")
    parts.append(f"first batch {result.warm_up_s:.0f} s")
    if result.fp8_error is not None:
        parts.append(
            f"fp8 error {result.fp8_error:.1%}, {result.fp8_speed_up:.2f} times as fast as bf16"
        )
    return "; ".join(parts)


@bench.command("scaling")
@click.option("--model", help="Checkpoint; the default is SDXL with random weights, made first.")
@click.option(
    "--workers", default="1,2", show_default=True, help="Numbers of workers, one run for each."
)
@click.option("--images-per-worker", default=80, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--steps", default=30, show_default=True)
@click.option("--profile", default="auto", show_default=True, help="Memory profile.")
@click.option("--out", type=click.Path(), help="New folder; the default is a temporary one.")
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object per line.")
def bench_scaling(
    model: str | None,
    workers: str,
    images_per_worker: int,
    batch_size: int,
    steps: int,
    profile: str,
    out: str | None,
    is_json: bool,
) -> None:
    """Render the same model on one GPU, then on two, through the whole engine: images/s of each.

    \b
    raydiff bench scaling
    raydiff bench scaling --workers 1,2,4,8
    """
    from pathlib import Path

    from raydiff.bench.scaling import bench_scaling as run
    from raydiff.bench.scaling import write_random_checkpoint

    counts = [int(count) for count in workers.split(",")]
    with tempfile.TemporaryDirectory(prefix="raydiff-bench-") as name:
        folder = Path(out or name)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = model or str(write_random_checkpoint("sdxl", folder / "sdxl"))
        for report in run(
            checkpoint,
            folder,
            counts,
            images_per_worker=images_per_worker,
            batch_size=batch_size,
            num_inference_steps=steps,
            profile=profile,
        ):
            if is_json:
                click.echo(json.dumps(asdict(report)))
                continue
            click.echo(
                f"{report.num_workers} workers: {report.images_per_s:.3f} images/s, "
                f"{report.speedup:.3f} times one worker's ({report.num_images} images, "
                f"{report.elapsed_s:.0f} s in all)"
            )


@bench.command("mini")
@click.argument("models", nargs=-1)
@click.option("--captions", default=400, show_default=True, help="Held-out captions to render.")
@click.option("--guidance-scale", type=float, help="The default is the model's own.")
@click.option("--steps", type=int, help="Likewise.")
@click.option("--sampler", help="Likewise.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--sheet", type=click.Path(), help="Image file to show the pictures in.")
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object per line.")
def mini(
    models: tuple[str, ...],
    captions: int,
    guidance_scale: float | None,
    steps: int | None,
    sampler: str | None,
    batch_size: int,
    sheet: str | None,
    is_json: bool,
) -> None:
    """Render captions that no training has seen with the miniatures MODELS, look and listen.

    Without MODELS, those that ship with raydiff. Each share is of the captions for which all
    objects are right. `pan` is of the clips whose shape moves left or right.

    \b
    raydiff bench mini
    raydiff bench mini my-models/mini-sd21
    raydiff bench mini my-models/mini-sdxl --guidance-scale 1 --sheet pictures.png
    """
    from raydiff.bench.mini import MINIATURES, bench_mini
    from raydiff.bench.mini_clips import bench_mini_clips
    from raydiff.weights.resolve import resolve_model

    for model in models or MINIATURES:
        options: dict[str, Any] = {
            "num_captions": captions,
            "guidance_scale": guidance_scale,
            "num_inference_steps": steps,
            "batch_size": batch_size,
            "sheet": sheet,
        }
        if resolve_model(model).video is None:
            report = asdict(bench_mini(model, sampler=sampler, **options))
        else:
            report = asdict(bench_mini_clips(model, **options))
        click.echo(json.dumps(report) if is_json else _mini_line(report))


def _mini_line(report: dict[str, Any]) -> str:
    """Return a miniature's report as a line."""
    shares = [f"{name} {value:.1%}" for name, value in report.items() if name in _MINI_SHARES]
    sampler = f" of {report['sampler']}" if "sampler" in report else ""
    what, seconds = next(
        (name.removeprefix("seconds_per_"), value)
        for name, value in report.items()
        if name.startswith("seconds_per_")
    )
    return (
        f"{report['model']}: {', '.join(shares)} ({report['num_captions']} captions, "
        f"{report['num_inference_steps']} steps{sampler}, guidance "
        f"{report['guidance_scale']:g}); {seconds:.2f} s per {what}"
    )


_MINI_SHARES = (
    "color",
    "shape",
    "count",
    "position",
    "direction",
    "background",
    "tone",
    "pan",
    "everything",
)
