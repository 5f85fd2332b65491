"""RunConfig: defaults, job files, overrides, and errors that name key, value, rule and remedy."""

from pathlib import Path

import pytest

from raydiff.config import RunConfig, load_config, parse_override
from raydiff.errors import ConfigError


def load(tmp_path: Path, text: str, **overrides: object) -> RunConfig:
    job_file = tmp_path / "job.yaml"
    job_file.write_text(text, encoding="utf-8")
    return load_config(job_file, {key.replace("__", "."): v for key, v in overrides.items()})


def test_no_file_gives_the_defaults() -> None:
    assert load_config() == RunConfig()
    assert load_config().model.name == "sdxl"


def test_overrides_lie_over_the_job_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "manifest: a.parquet\nmodel: {name: sd21, dtype: float32}\ndefaults: {height: 512}\n",
        model__name="other",
        memory__devices__vae="cpu",
        engine__workers=3,
    )
    assert config.manifest == "a.parquet"
    assert (config.model.name, config.model.dtype) == ("other", "float32")
    assert config.defaults.height == 512
    assert config.memory.devices == {"vae": "cpu"}
    assert config.engine.workers == 3


def test_a_section_with_nothing_in_it_is_as_good_as_absent(tmp_path: Path) -> None:
    text = "model:\n#  name: sd21\nout: x\n"
    assert load(tmp_path, text) == RunConfig(out="x")
    assert load(tmp_path, text, model__name="sd21").model.name == "sd21"


def test_a_folder_named_after_a_day_stays_text(tmp_path: Path) -> None:
    assert load(tmp_path, "out: 2026-01-31\n").out == "2026-01-31"
    assert parse_override("out=2026-01-31") == ("out", "2026-01-31")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("model.dtype=float32", "model.dtype", "float32"),
        ("engine.workers = 2", "engine.workers", 2),
        ("model.compile=true", "model.compile", True),
        ("defaults.sampler=null", "defaults.sampler", None),
        ("out=", "out", None),
        ("defaults.negative_prompt=a=b", "defaults.negative_prompt", "a=b"),
        ("manifest=s3://bucket/x.parquet", "manifest", "s3://bucket/x.parquet"),
        ("manifest=[x", "manifest", "[x"),
    ],
)
def test_override_values_are_typed(text: str, key: str, value: object) -> None:
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize("text", ["model.dtype", "=3", " =3"])
def test_an_override_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_override(text)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("modle.name", "x", 'modle: unknown key; did you mean "model"? known: '),
        ("model.dtpye", "x", 'model.dtpye: unknown key; did you mean "dtype"? known: compile, '),
        ("model", "sdxl", "model: 'sdxl': this is a section; set its keys: "),
        ("engine.workers", 0, "engine.workers: 0: "),
        ("engine.workers", "many", "engine.workers: 'many': "),
        ("engine.batch_size", -1, "engine.batch_size: -1: "),
        ("memory.profile", "fullgpu", "memory.profile: 'fullgpu': Input should be 'full_gpu', "),
        ("memory.devices.vea", "cpu", "memory.devices: 'vea': Input should be 'text_encoder', "),
        ("defaults.guidance_scale", float("nan"), "defaults.guidance_scale: nan: "),
        ("defaults.guidance_scale", float("inf"), "defaults.guidance_scale: inf: "),
        ("defaults.guidance_rescale", 1.5, "defaults.guidance_rescale: 1.5: "),
        ("defaults.num_inference_steps", 0, "defaults.num_inference_steps: 0: "),
        ("defaults.strength", -0.1, "defaults.strength: -0.1: "),
        ("defaults.height", 0, "defaults.height: 0: "),
        ("defaults.seed", 2**63, f"defaults.seed: {2**63}: "),
        ("defaults.seed", 1.5, "defaults.seed: 1.5: "),
        ("prompts", "one text", "prompts: 'one text': "),
        ("limit", 0, "limit: 0: "),
        ("output.image", "gif", "output.image: 'gif': "),
    ],
)
def test_errors_say_key_value_and_rule_in_one_line(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides={key: value})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert "constrained" not in str(caught.value)


def test_a_rule_is_said_once_however_many_alternatives_have_it() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides={"sweep.grid": {"stg_blocks": [["middle"]]}})
    assert str(caught.value).count("Input should be a valid integer,") == 1
    assert str(caught.value).count("Input should be a valid boolean") == 1


def test_every_wrong_key_is_said_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "limit: 0\nmodel: {nam: x}\nengine: {workers: none}\n")
    message = str(caught.value)
    assert message.startswith(f"job file {tmp_path / 'job.yaml'}: ")
    for key in ("limit: 0", "model.nam: unknown key", "engine.workers: 'none'"):
        assert key in message


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n"])
def test_a_job_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected keys and values"):
        load(tmp_path, text)


def test_a_job_file_that_is_not_yaml_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load(tmp_path, "model: {name: [\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "missing.yaml")


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="out is a value, not a section"):
        load(tmp_path, "out: x\n", out__image="png")
