"""RunConfig: everything about a run that is not in its manifest, from one YAML file plus
`--set section.key=value` overrides. Sections: model, ltx2, defaults, sweep, input, engine, memory
and output."""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar, get_args
from urllib.parse import SplitResult, urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raydiff.errors import ConfigError, nearest
from raydiff.video_codecs import CodecName, VideoFormat, codec_problem
from raydiff.video_settings import TextBackend, VideoMode

ProfileName = Literal["full_gpu", "balanced", "gpu_poor", "extreme", "cpu_only"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A mapping of a YAML file: unknown keys are errors, and nothing in it changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=False)


S = TypeVar("S", bound=Section)


class ModelConfig(Section):
    """Which checkpoint, and how it is run."""

    name: str = "sdxl"
    """Alias from configs/models, Hub id, local folder or single .safetensors file."""
    revision: str | None = None
    """Hub branch, tag or commit; None is the alias's pinned one, else the Hub's default branch."""
    variant: Literal["auto", "fp16", "none"] = "auto"
    """Weight files to fetch from the Hub: auto takes fp16 files unless dtype is float32."""
    dtype: DTypeName = "auto"
    """auto is float32 on CPU and bfloat16 on CUDA."""
    vae_dtype: DTypeName = "auto"
    """auto is `dtype`, except float32 where `dtype` is float16 (SDXL's decoder overflows in it)."""
    compile: bool = False
    """torch.compile the UNet and the VAE decoder, or the transformer's blocks: slow to start,
    faster for long runs on CUDA."""


class LTX2Config(Section):
    """How LTX-2 makes clips, and where the embeddings of their texts come from."""

    mode: VideoMode = "one_stage"
    """distilled: for checkpoints with 8 steps of their own. two_stage: at half the size first."""
    text_encoder: TextBackend = "gemma3"
    """gemma3: the checkpoint's. precomputed: read from `embeds`. api: from `encoder_url`. random:
    noise, to try a run out without text encoder."""
    embeds: str | None = None
    """Folder of encoded texts, as `raydiff encode` writes it."""
    encoder_url: str | None = None
    """Where `raydiff encode-server` answers, e.g. http://encoder:8080."""
    encoder_hosts: tuple[str, ...] = ()
    """Hosts that may be asked; there is none unless it is named here."""

    @model_validator(mode="after")
    def _has_what_its_encoder_needs(self) -> Self:
        options = {"embeds": "precomputed", "encoder_url": "api", "encoder_hosts": "api"}
        for name, backend in options.items():
            if getattr(self, name) and self.text_encoder != backend:
                raise ValueError(
                    f"{name} is given, and text_encoder is {self.text_encoder}; it is an option of "
                    f"{backend}. Leave it out, or set ltx2.text_encoder={backend}"
                )
        if self.text_encoder == "precomputed" and not self.embeds:
            raise ValueError(
                "text_encoder is precomputed, and no folder is named. Set ltx2.embeds to one that "
                "`raydiff encode` wrote"
            )
        if self.text_encoder == "api":
            encoder_address(self)
        return self


class EncoderAddress(NamedTuple):
    """Where an encoder service answers."""

    is_https: bool
    host: str
    port: int
    path: str
    """Before its own paths, without `/` at its end."""


def encoder_address(config: LTX2Config) -> EncoderAddress:
    """Return the address that `encoder_url` says. Raises ValueError unless its host is allowed."""
    if not config.encoder_url:
        raise ValueError(
            "text_encoder is api, and no service is named. Set ltx2.encoder_url, e.g. "
            "http://encoder:8080, and its host in ltx2.encoder_hosts"
        )
    # What stands before an @ may be a password: it is never shown.
    shown = config.encoder_url.rsplit("@", 1)[-1]
    try:
        url = urlsplit(config.encoder_url)
        port = url.port
    except ValueError as error:
        raise ValueError(f"encoder_url {shown!r}: {error}. Write http://host:port") from None
    _check_encoder_url(url, shown)
    host = str(url.hostname)
    if host not in {allowed.lower() for allowed in config.encoder_hosts}:
        raise ValueError(
            f"encoder_url {shown}: the prompts would be sent to {host}, which encoder_hosts does "
            f"not allow. If that is meant, set ltx2.encoder_hosts=[{host}]"
        )
    is_https = url.scheme == "https"
    return EncoderAddress(is_https, host, port or (443 if is_https else 80), url.path.rstrip("/"))


def _check_encoder_url(url: SplitResult, shown: str) -> None:
    if "@" in url.netloc:
        raise ValueError(
            f"encoder_url ...@{shown}: it has a name or password in it, which logs would show. Set "
            "the service's token in the environment, RAYDIFF_ENCODER_TOKEN"
        )
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"encoder_url {shown!r}: expected http:// or https://, a host and a port")
    if url.query or url.fragment:
        raise ValueError(f"encoder_url {shown}: it has a query or a fragment. Leave it out")


Block = Annotated[int, Field(ge=0)]


class DefaultsConfig(Section):
    """Values for rows that leave a column out; None takes the model's default."""

    negative_prompt: str | None = None
    num_images: int = Field(1, ge=1, le=4096)
    height: int | None = Field(None, ge=16, le=16384)
    width: int | None = Field(None, ge=16, le=16384)
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0.0, le=100.0)
    guidance_rescale: float | None = Field(None, ge=0.0, le=1.0)
    sampler: str | None = None
    strength: float | None = Field(None, ge=0.0, le=1.0)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    num_frames: int | None = Field(None, ge=1, le=100_000)
    frame_rate: float | None = Field(None, gt=0.0, le=1000.0)
    stg_scale: float | None = Field(None, ge=0.0, le=100.0)
    stg_blocks: Block | tuple[Block, ...] | None = None
    modality_scale: float | None = Field(None, ge=0.0, le=100.0)
    audio_guidance_scale: float | None = Field(None, ge=0.0, le=100.0)
    audio_stg_scale: float | None = Field(None, ge=0.0, le=100.0)
    audio_modality_scale: float | None = Field(None, ge=0.0, le=100.0)
    audio_guidance_rescale: float | None = Field(None, ge=0.0, le=1.0)


class InputConfig(Section):
    """Where init images may come from."""

    root: str | None = None
    """Folder that init images must lie in; None is the manifest's own folder."""


class EngineConfig(Section):
    """Workers, stages, batches and patience."""

    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """auto is one per GPU, or one CPU worker where there is none."""
    stages: Literal["fused", "split", "auto"] = "auto"
    """fused: a worker does all stages. split: the stages of the cluster file, each on workers of
    its own. auto splits where the text encoders' place is the CPU and CPU nodes are there."""
    cluster: str | None = None
    """Which workers do which stage: a name from configs/clusters or a YAML file."""
    address: str | None = None
    """Ray cluster to join: `host:port`, or `auto` on one of its nodes; None starts one."""
    insecure: bool = False
    """Join a cluster that asks for no token."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Largest batch; auto asks each worker's memory profile."""
    batches_in_flight: int = Field(2, ge=1, le=16)
    """Batches queued on each worker, the running one included."""
    lookahead: int = Field(4096, ge=1)
    """Rows read ahead of the renderers, to find rows that can share a batch."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Seconds that a worker may take to be placed, and again to load its model."""
    health_timeout_s: float = Field(60.0, gt=0)
    """Seconds without an answer to a ping after which a worker is killed as hung."""
    row_timeout_s: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Seconds that a row may take; auto goes by what rows of its kind have taken in this run."""
    max_crashes: int = Field(3, ge=1)
    """Worker crashes with which a row is quarantined."""
    max_worker_failures: int = Field(16, ge=2)
    """Rows failed in a row that retire a worker; another one tries them again."""
    max_failed_percent: float = Field(50.0, gt=0, le=100)
    """Share of failed rows, once 200 have ended, that stops the run."""
    embeds_cache_gib: float = Field(2.0, gt=0)
    """Split stages: room for encoded prompts in the cluster."""
    embeds_on_disk: bool = False
    """Split stages: keep encoded prompts beside the output, for later runs."""


class MemoryConfig(Section):
    """The memory profile, and single choices that override it."""

    profile: ProfileName | Literal["auto"] = "auto"
    devices: dict[Literal["text_encoder", "unet", "vae"], str] = Field(default_factory=dict)
    """Device per component (`cpu`, `cuda`), over the profile's."""


class OutputConfig(Section):
    """Files and metadata."""

    format: Literal["files", "webdataset"] = "files"
    """A file for each image or clip, or tar shards of many."""
    shard_rows: int = Field(1000, ge=1)
    """Samples of a shard."""
    shard_s: float = Field(600.0, gt=0)
    """Longest time that a finished row waits for its shard to be closed."""
    image: Literal["png", "jpg", "webp"] = "png"
    quality: int = Field(95, ge=1, le=100)
    """JPEG and WebP quality."""
    png_compression: int = Field(3, ge=0, le=9)
    """zlib level: higher is smaller and slower."""
    video: VideoFormat = "mp4"
    """A clip with sound (mp4, webm), one without (gif), or a folder of PNG files (frames)."""
    codec: CodecName | None = None
    """h264, hevc or av1 in an mp4; vp9 or av1 in a webm. None takes the first of them."""
    crf: int | None = None
    """Lower is better and larger. None takes the codec's default."""
    preset: str | None = Field(None, coerce_numbers_to_str=True)
    """The encoder's own name for its speed. None takes the codec's default."""
    wav: bool = False
    """Write a clip's sound to a WAV file beside it as well."""
    video_threads: int = Field(4, ge=1, le=64)
    """Encoder threads of one clip. They are part of what makes the bytes, so that the machine's
    number of cores is not."""
    strip_metadata: bool = False
    """Leave the request out of the file."""
    sheet: str | None = None
    """A .png or .pdf file for a contact sheet of the first 100 results, written when a run ends."""
    commit_s: float = Field(2.0, gt=0)
    """Longest time that a finished row waits for its metadata to be committed."""
    commit_rows: int = Field(5000, ge=1)
    """Most finished rows in one metadata part."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        problem = codec_problem(self.video, self.codec, self.crf, self.preset)
        if problem is not None:
            raise ValueError(problem)
        if self.video == "frames" and self.format == "webdataset":
            raise ValueError(
                "video is frames, a folder for each clip; a tar of output.format webdataset holds "
                "a file for each. Use output.video mp4, webm or gif, or output.format files."
            )
        return self


SweepValue = bool | int | float | str | None
SweepValues = tuple[SweepValue | tuple[int, ...], ...]


class SweepConfig(Section):
    """Rows made of axes, from the manifest's rows, the prompts or templates alone."""

    template: str | tuple[str, ...] = ()
    """One or several prompts with {fields}, {choices|between|texts} and __wildcards__."""
    wildcards: str | None = None
    """Folder with a file NAME.txt for each __NAME__, a text a line."""
    choices: Literal["all", "random"] = "all"
    """Every text that a template gives is a value of its own, or each row takes one by chance."""
    grid: dict[str, SweepValue | SweepValues] = Field(default_factory=dict)
    """Values by column: a list (of lists for stg_blocks), or text as on the command line
    (`3,5,7.5`)."""
    seeds: int | str | tuple[int | str, ...] | None = None
    """Seeds, e.g. `0-9` or [1, 2, 3]."""
    mode: Literal["cartesian", "zip", "random"] = "cartesian"
    """Every combination; the first values together, then the second, ...; a sample."""
    samples: int | None = Field(None, ge=1)
    """Rows of a random sweep."""
    random_seed: int = Field(0, ge=0, le=2**63 - 1)
    """What random modes and choices start from."""
    max_rows: int = Field(1_000_000, ge=1)
    """A sweep of more rows is refused."""


class RunConfig(Section):
    """One run: a manifest (or prompts), an output folder and the sections above."""

    manifest: str | None = None
    prompts: tuple[str, ...] = ()
    """Prompts given in place, instead of a manifest."""
    out: str | None = None
    limit: int | None = Field(None, ge=1)
    """Render only the first `limit` manifest rows."""
    model: ModelConfig = ModelConfig()
    ltx2: LTX2Config = LTX2Config()
    defaults: DefaultsConfig = DefaultsConfig()
    sweep: SweepConfig = SweepConfig()
    """Multiplies the manifest's rows or the prompts; nothing in it leaves them as they are."""
    input: InputConfig = InputConfig()
    engine: EngineConfig = EngineConfig()
    memory: MemoryConfig = MemoryConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _keeps_what_it_encodes(self) -> Self:
        if self.engine.embeds_on_disk and self.ltx2.text_encoder != "gemma3":
            raise ValueError(
                "engine.embeds_on_disk keeps what the run's own text encoders make, and "
                f"ltx2.text_encoder is {self.ltx2.text_encoder}. Leave one of them out; "
                "`raydiff encode` fills a folder for later runs"
            )
        return self


def load_config(
    job_file: str | Path | None = None, overrides: dict[str, Any] | None = None
) -> RunConfig:
    """Read a job file (YAML) and lay `overrides` ({"section.key": value}) over it.

    Raises ConfigError naming the key, its value, the rule and the nearest known key.
    """
    values: dict[str, Any] = {}
    where = ""
    if job_file is not None:
        where = f"job file {job_file}"
        values = read_yaml(Path(job_file), where, example="manifest: x.parquet")
    for key, value in (overrides or {}).items():
        _set_dotted(values, key, value)
    return validate(RunConfig, values, where)


def validate(schema: type[S], values: dict[str, Any], where: str) -> S:
    """Return the section that `values` are; ConfigError, which begins with `where`, says what is
    wrong with each key."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        prefix = f"{where}: " if where else ""
        raise ConfigError(prefix + _explain(error, schema)) from None


def parse_override(text: str) -> tuple[str, Any]:
    """Split `section.key=value`; the value is read as YAML, so `null`, `2` and `true` are typed."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: expected section.key=value, e.g. model.dtype=float32")
    try:
        return key.strip(), yaml.load(value, _PlainLoader)
    except yaml.YAMLError:
        return key.strip(), value


def read_yaml(path: Path, where: str, *, example: str) -> dict[str, Any]:
    """Return the keys and values of a YAML file; ConfigError begins with `where`."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected keys and values, e.g. `{example}`")
    # A section whose lines are all commented out reads as null: it is as good as absent.
    return {key: value for key, value in values.items() if value is not None}


class _PlainLoader(yaml.SafeLoader):
    """YAML without dates: `out: 2026-01-31` names a folder."""


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted}: {section} is a value, not a section")
    values[key] = value


def _explain(error: ValidationError, schema: type[Section]) -> str:
    """Say every wrong key in one line each; the alternatives of a key are joined by "or"."""
    rules: dict[str, list[str]] = {}
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        sections, known = _known_part(path, schema)
        if problem["type"] == "extra_forbidden":
            hint = nearest(path[-1], known)
            key, rule = ".".join(path), f"unknown key; {hint}known: {', '.join(known)}"
        elif problem["type"] == "model_type":
            key = ".".join(path)
            rule = f"{problem['input']!r}: this is a section; set its keys: {', '.join(known)}"
        elif problem["type"] == "missing":
            key, rule = ".".join(path), "is missing"
        elif problem["type"] == "value_error":
            key, rule = ".".join(sections), str(problem["ctx"]["error"])
        else:
            key, rule = ".".join(sections), f"{problem['input']!r}: {problem['msg']}"
        alternatives = rules.setdefault(key, [])
        if not any(problem["msg"] in said for said in alternatives):
            alternatives.append(problem["msg"] if alternatives else rule)
    lines = [(f"{key}: " if key else "") + " or ".join(said) for key, said in rules.items()]
    return "\n".join(lines)


def _known_part(path: list[str], schema: type[BaseModel]) -> tuple[list[str], list[str]]:
    """Return the keys of a path down to the value, and the known keys of its section.

    pydantic appends the alternative that failed (`engine.workers.literal['auto']`).
    """
    section = schema
    for depth, part in enumerate(path, start=1):
        field = section.model_fields.get(part)
        if field is None:
            break
        inner = _section_of(field.annotation)
        if inner is None:
            return path[:depth], sorted(section.model_fields)
        section = inner
    return path, sorted(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field is or, beside None, may be."""
    alternatives = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    for kind in alternatives:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
