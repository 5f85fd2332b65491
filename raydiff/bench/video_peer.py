"""diffusers' LTX2Pipeline on the weights of our modules, before their layers are fused, measured in
the same stages."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from raydiff.bench.timing import ForwardTimer, clean_gpu, timed
from raydiff.bench.video_job import Sampling, Scene, VideoBench, video_bench
from raydiff.diffusion.flow_match import DISTILLED_SIGMAS
from raydiff.errors import ConfigError
from raydiff.gemma_tokenizer import write_tiny_gemma_tokenizer
from raydiff.request import RenderRequest, num_evaluations
from raydiff.weights.published_ltx2 import SCHEDULER


def bench_diffusers(
    scene: Scene,
    samplings: Sequence[Sampling],
    modules: Mapping[str, nn.Module],
    flops: int,
    device: torch.device,
) -> Iterator[VideoBench]:
    """Measure the peer with each sampling; compiled, its blocks are, as ours."""
    with clean_gpu():
        pipe = _pipeline(scene, modules, device)
        if scene.is_compiled:
            # Not as full graphs, which its perturbed passes do not make.
            pipe.transformer.compile_repeated_blocks()
        for sampling in samplings:
            yield _measure(scene, sampling, pipe, flops)


def _pipeline(scene: Scene, modules: Mapping[str, nn.Module], device: torch.device) -> Any:
    try:
        import diffusers
        import transformers
        from diffusers.pipelines import ltx2
    except ImportError as error:
        raise ConfigError(f"the peer needs diffusers and transformers: {error}") from None
    configs = scene.configs
    text_config = transformers.Gemma3TextConfig(**configs["text_encoder"]["text_config"])
    classes = {
        "transformer": diffusers.LTX2VideoTransformer3DModel,
        "connectors": ltx2.LTX2TextConnectors,
        "vae": diffusers.AutoencoderKLLTX2Video,
        "audio_vae": diffusers.AutoencoderKLLTX2Audio,
        "vocoder": ltx2.LTX2VocoderWithBWE if scene.version == "2.3" else ltx2.LTX2Vocoder,
    }
    parts: dict[str, Any] = {}
    for name in ("text_encoder", *classes):
        with device, _default_dtype(torch.float32 if name == "vocoder" else torch.bfloat16):
            if name == "text_encoder":
                parts[name] = transformers.Gemma3TextModel(text_config)
            else:
                parts[name] = classes[name].from_config(configs[name])
        # Ours take the place of its own, which are freed before the next component is built.
        parts[name].load_state_dict(modules[name].state_dict(), assign=True)
        parts[name].requires_grad_(False).eval()
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_gemma_tokenizer(Path(folder), max_length=scene.max_tokens)
        tokenizer = transformers.GemmaTokenizer.from_pretrained(folder)
    pipe = diffusers.LTX2Pipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let modules be built in `dtype`: in float32 they would not fit beside the weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _measure(scene: Scene, sampling: Sampling, pipe: Any, flops: int) -> VideoBench:
    timer = ForwardTimer(pipe.transformer, lambda _, named: len(named["hidden_states"]))
    short = Sampling(num_steps=2, guidance=sampling.guidance)
    warm_up_s, _ = timed(_render, scene, short, pipe, 0)
    times = []
    for batch in range(1, scene.num_batches + 1):
        with timer.running():
            times.append(_render(scene, sampling, pipe, batch))
    encode_s, denoise_s, decode_s = (median(stage) for stage in zip(*times, strict=True))
    return video_bench(
        scene,
        sampling,
        renderer="diffusers",
        nfe=num_evaluations(sampling.requests(scene, 1)[0]),
        encode_s=encode_s,
        denoise_s=denoise_s,
        decode_s=decode_s,
        write_s=None,
        timer=timer,
        flops=flops,
        warm_up_s=warm_up_s,
    )


@torch.no_grad()
def _render(scene: Scene, sampling: Sampling, pipe: Any, batch: int) -> tuple[float, float, float]:
    """Make a batch of clips, and return the seconds of its encoding, denoising and decoding."""
    requests = sampling.requests(scene, batch)
    has_negative = sampling.guidance != "none"
    encode_s, encoded = timed(
        lambda: pipe.encode_prompt(
            sampling.prompts(scene, batch),
            "",
            do_classifier_free_guidance=has_negative,
            max_sequence_length=scene.max_tokens,
        )
    )
    names = ("prompt_embeds", "prompt_attention_mask")
    embeds = dict(zip((*names, *(f"negative_{name}" for name in names)), encoded, strict=True))
    arguments = {**_arguments(requests), **embeds, "output_type": "latent", "return_dict": False}
    if sampling.mode == "distilled":
        # The schedule of distilled checkpoints is taken as it is.
        fixed = {"use_dynamic_shifting": False, "shift_terminal": None}
        pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, **fixed)
        arguments["sigmas"] = list(DISTILLED_SIGMAS[:-1])
    denoise_s, (video, audio) = timed(lambda: pipe(**arguments))
    if tuple(video.shape[2:]) != tuple(scene.latent_size):
        raise RuntimeError(
            f"diffusers made latents {tuple(video.shape[2:])}, not {tuple(scene.latent_size)}"
        )
    decode_s, _ = timed(_decode, pipe, video, audio)
    pipe.scheduler = pipe.scheduler.from_config(SCHEDULER)
    return encode_s, denoise_s, decode_s


def _arguments(requests: Sequence[RenderRequest]) -> dict[str, Any]:
    """Return what a batch's requests share, as diffusers' pipeline takes it, and their seeds."""
    first = requests[0]
    video = first.video
    if video is None:
        raise ValueError("a request for an image; LTX-2 makes clips")
    return {
        "height": first.height,
        "width": first.width,
        "num_frames": video.num_frames,
        "frame_rate": video.frame_rate,
        "num_inference_steps": first.num_inference_steps,
        "guidance_scale": first.guidance_scale,
        "guidance_rescale": first.guidance_rescale,
        "stg_scale": video.stg_scale,
        "modality_scale": video.modality_scale,
        "audio_guidance_scale": video.audio_guidance_scale,
        "audio_guidance_rescale": video.audio_guidance_rescale,
        "audio_stg_scale": video.audio_stg_scale,
        "audio_modality_scale": video.audio_modality_scale,
        "spatio_temporal_guidance_blocks": list(video.stg_blocks),
        "generator": [torch.Generator("cpu").manual_seed(one.seed) for one in requests],
    }


def _decode(pipe: Any, video: torch.Tensor, audio: torch.Tensor) -> None:
    """Decode as the pipeline's last lines do, to frames and samples on the host."""
    frames = pipe.vae.decode(video.to(pipe.vae.dtype), None, return_dict=False)[0]
    pipe.video_processor.postprocess_video(frames, output_type="np")
    mel = pipe.audio_vae.decode(audio.to(pipe.audio_vae.dtype), return_dict=False)[0]
    pipe.vocoder(mel.float()).cpu()
