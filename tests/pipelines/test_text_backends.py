"""LTX-2's text backends: the same features from the encoder, a folder and a service, bit for bit;
and what a service that is not what it should be comes to."""

import http.client
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from raydiff.config import LTX2Config, encoder_address, load_config
from raydiff.errors import ConfigError, EngineError, RowError
from raydiff.pipelines.embeds_store import EmbedsStore
from raydiff.pipelines.encoder_client import TOKEN_VARIABLE, EncoderClient, Patience
from raydiff.pipelines.encoder_reply import MAX_BODY_BYTES, MAX_TEXTS, EncodeReply
from raydiff.pipelines.encoder_server import EncoderServer
from raydiff.pipelines.ltx2.pipeline import LTX2Pipeline
from raydiff.pipelines.prompt_cache import EncodedPrompt
from raydiff.pipelines.text_backends import (
    UNREAD,
    FeatureSpec,
    RandomTexts,
    RemoteTexts,
    TextBackend,
    text_backend,
)
from tests.pipelines.encoder_services import (
    TOKEN,
    Answer,
    ScriptedService,
    about_pipeline,
    encoder_service,
    scripted_service,
)
from tests.pipelines.tiny_ltx2 import MAX_LENGTH, clip_request, tiny_components, tiny_pipeline

TEXTS = ("a red cat", "", "a dog " * 40, "ein Hündchen 犬", *(f"text {n}" for n in range(15)))
QUICK = Patience(start_s=0.2, total_s=0.4, first_pause_s=0.02, reply_s=5.0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> LTX2Pipeline:
    return tiny_pipeline(tiny_components("2.3", tmp_path_factory.mktemp("tokenizer")), "2.3")


@pytest.fixture(scope="module")
def spec(pipeline: LTX2Pipeline) -> FeatureSpec:
    connectors = pipeline.parts.connectors
    assert connectors is not None
    return FeatureSpec(
        revision=pipeline.info.revision,
        num_channels=connectors.config.num_features,
        max_tokens=MAX_LENGTH,
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def encoded(pipeline: LTX2Pipeline) -> list[EncodedPrompt]:
    return pipeline.encode_texts(TEXTS)


@pytest.fixture(scope="module")
def service(pipeline: LTX2Pipeline) -> Iterator[EncoderServer]:
    with encoder_service(pipeline) as server:
        yield server


@pytest.fixture(scope="module")
def locked_service(pipeline: LTX2Pipeline) -> Iterator[EncoderServer]:
    with encoder_service(pipeline, TOKEN) as server:
        yield server


@pytest.fixture
def script(pipeline: LTX2Pipeline) -> Iterator[ScriptedService]:
    """Return a service that says at first that it has the same checkpoint."""
    with scripted_service() as server:
        server.answers = [Answer(200, json.dumps(asdict(about_pipeline(pipeline))).encode())]
        yield server


def api(url: str) -> LTX2Config:
    return LTX2Config(text_encoder="api", encoder_url=url, encoder_hosts=("127.0.0.1",))


def remote(server: ScriptedService | EncoderServer, spec: FeatureSpec) -> RemoteTexts:
    return RemoteTexts(EncoderClient(encoder_address(api(server.url)), patience=QUICK), spec)


def precomputed(folder: Path, spec: FeatureSpec) -> TextBackend:
    backend = text_backend(LTX2Config(text_encoder="precomputed", embeds=str(folder)), spec)
    assert backend is not None
    return backend


def reply(encoded: list[EncodedPrompt], revision: str) -> Answer:
    return Answer(200, EncodeReply(revision=revision, texts=tuple(encoded)).serialize())


def keep(folder: Path, encoded: list[EncodedPrompt], spec: FeatureSpec) -> None:
    """Write what `raydiff encode` would."""
    folder.mkdir(exist_ok=True)
    EmbedsStore(str(folder)).write(dict(zip(TEXTS, encoded, strict=False)), revision=spec.revision)


def are_equal(left: list[EncodedPrompt], right: list[EncodedPrompt]) -> bool:
    """Whether two encodings are the same, bit by bit."""
    return all(
        a.embeds.dtype == b.embeds.dtype
        and torch.equal(a.embeds, b.embeds)
        and a.is_truncated == b.is_truncated
        for a, b in zip(left, right, strict=True)
    )


# The same features.


def test_service_and_folder_give_the_encoders_features_bit_for_bit(
    service: EncoderServer, encoded: list[EncodedPrompt], spec: FeatureSpec, tmp_path: Path
) -> None:
    assert len(TEXTS) > MAX_TEXTS
    assert [one.is_truncated for one in encoded] == [text.startswith("a dog") for text in TEXTS]
    from_service = text_backend(api(service.url), spec)
    assert from_service is not None
    assert are_equal(from_service.encode(TEXTS), encoded)
    keep(tmp_path, encoded, spec)
    assert are_equal(precomputed(tmp_path, spec).encode(TEXTS), encoded)
    assert precomputed(tmp_path, spec).encode([]) == []


def test_gemma3_is_no_other_backend(spec: FeatureSpec) -> None:
    assert text_backend(LTX2Config(), spec) is None


def test_features_of_another_dtype_are_cast_those_of_the_same_are_taken(
    service: EncoderServer, encoded: list[EncodedPrompt], spec: FeatureSpec, tmp_path: Path
) -> None:
    wanted = replace(spec, dtype=torch.bfloat16)
    rounded = [one.cast(torch.bfloat16) for one in encoded]
    assert are_equal(remote(service, wanted).encode(TEXTS[:1]), rounded[:1])
    half = [one.cast(torch.float16) for one in encoded]
    keep(tmp_path, half[:2], spec)
    assert are_equal(
        precomputed(tmp_path, wanted).encode(TEXTS[:2]),
        [one.cast(torch.bfloat16) for one in half[:2]],
    )
    keep(tmp_path, encoded[:2], spec)
    assert are_equal(precomputed(tmp_path, wanted).encode(TEXTS[:2]), rounded[:2])
    doubled = [replace(one, embeds=2 * one.embeds) for one in rounded]
    keep(tmp_path, doubled[:1], spec)
    assert are_equal(precomputed(tmp_path, wanted).encode(TEXTS[:2]), [doubled[0], rounded[1]])


# A folder.


def test_a_text_that_is_not_in_the_folder_is_its_rows_error(
    encoded: list[EncodedPrompt], spec: FeatureSpec, tmp_path: Path
) -> None:
    keep(tmp_path, encoded[:2], spec)
    backend = precomputed(tmp_path, spec)
    with pytest.raises(RowError, match=r'"a blue cat" is not among .* Run `raydiff encode`'):
        backend.encode(["a red cat", "a blue cat"])
    assert are_equal(backend.encode(TEXTS[:2]), encoded[:2])
    with pytest.raises(RowError, match="for this checkpoint"):
        precomputed(tmp_path, replace(spec, revision="local-1")).encode(["a red cat"])


def test_a_damaged_file_is_no_text(
    encoded: list[EncodedPrompt], spec: FeatureSpec, tmp_path: Path
) -> None:
    keep(tmp_path, encoded[:1], spec)
    (file,) = (tmp_path / "embeds").glob("*/*")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(RowError, match="or its file is damaged"):
        precomputed(tmp_path, spec).encode(TEXTS[:1])


def test_a_folder_without_texts_is_refused_at_once(spec: FeatureSpec, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=r"no encoded texts\. Name a folder that"):
            precomputed(folder, spec)


# Noise.


def test_noise_is_the_texts_own_and_its_clip_says_so(
    pipeline: LTX2Pipeline, spec: FeatureSpec
) -> None:
    backend = RandomTexts(spec)
    first, again = backend.encode(["a red cat", "a blue cat"]), RandomTexts(spec).encode(TEXTS[:1])
    assert are_equal(first[:1], again)
    assert not torch.equal(first[0].embeds, first[1].embeds)
    assert first[0].embeds.shape == (4, spec.num_channels)
    assert backend.encode(["word " * 99])[0].embeds.shape == (MAX_LENGTH, spec.num_channels)
    size: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "seed": 1}
    rows = [
        clip_request(pipeline, "a red cat", "distilled", text_encoder=name, **size)
        for name in ("random", "gemma3")
    ]
    embeds = pipeline.gather(rows, {"a red cat": first[0]})
    assert embeds.warnings == (UNREAD, None)


# A service that is not what it should be.


def test_a_service_that_comes_back_is_waited_for(
    script: ScriptedService, encoded: list[EncodedPrompt], spec: FeatureSpec
) -> None:
    script.answers += [
        Answer(500, b'{"error": "busy"}'),
        Answer(0),
        Answer(200, b"cut short", (("Content-Length", "999"),)),
        reply(encoded[:1], spec.revision),
    ]
    assert are_equal(remote(script, spec).encode(TEXTS[:1]), encoded[:1])
    assert script.asked == ["/health", *["/encode"] * 4]


def test_one_that_stays_away_is_an_error_of_the_run(
    script: ScriptedService, spec: FeatureSpec
) -> None:
    script.answers += [Answer(503, b'{"error": "many requests wait"}')]
    backend = remote(script, spec)
    with pytest.raises(EngineError, match=r"no answer in 0\.4 s; .* 503: many requests wait"):
        backend.encode(TEXTS[:1])
    assert len(script.asked) > 2
    script.shutdown()
    script.server_close()
    with pytest.raises(EngineError, match=r"no answer in 0\.2 s; .*refused.*Start `raydiff encode"):
        remote(script, spec)


def test_a_redirect_is_not_followed(script: ScriptedService, spec: FeatureSpec) -> None:
    with scripted_service() as other:
        there = (("Location", f"{other.url}/encode"),)
        script.answers += [Answer(status, b"", there) for status in (302, 307, 308)]
        backend = remote(script, spec)
        for _ in range(3):
            with pytest.raises(EngineError, match="redirects to another address"):
                backend.encode(TEXTS[:1])
        assert other.asked == []


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "of no use"),
        (b"<html>hello</html>", "of no use"),
        (b"\x80\x04\x95 a pickle", "of no use"),
        (b"\0" * 2**20, "more than the"),
    ],
)
def test_an_answer_that_is_none_is_an_error_of_the_run(
    script: ScriptedService, spec: FeatureSpec, content: bytes, rule: str
) -> None:
    script.answers += [Answer(200, content)]
    backend = remote(script, spec)
    with pytest.raises(EngineError, match=rule):
        backend.encode(TEXTS[:1])
    script.answers = [Answer(200, content)]
    with pytest.raises(EngineError, match=r"no answer of `raydiff encode-server`"):
        remote(script, spec)


def test_features_of_another_shape_or_of_nan_are_of_no_use(
    script: ScriptedService, encoded: list[EncodedPrompt], spec: FeatureSpec
) -> None:
    (health,) = script.answers
    good = encoded[0].embeds
    for embeds in (good[:, 1:], good[:0], good[None], good.double(), good * torch.nan):
        script.answers = [health, reply([replace(encoded[0], embeds=embeds)], spec.revision)]
        with pytest.raises(EngineError, match="of no use: features"):
            remote(script, spec).encode(TEXTS[:1])
    script.answers = [health, reply(encoded[:2], spec.revision)]
    with pytest.raises(EngineError, match="of no use: is_truncated is not a list of 1"):
        remote(script, spec).encode(TEXTS[:1])


def test_a_service_with_another_checkpoint_is_refused(
    service: EncoderServer,
    script: ScriptedService,
    encoded: list[EncodedPrompt],
    spec: FeatureSpec,
) -> None:
    other = replace(spec, revision="local-1")
    with pytest.raises(ConfigError, match="revision 'local-0', this run's of 'local-1'"):
        remote(service, other)
    script.answers += [reply(encoded[:1], "local-1")]
    with pytest.raises(EngineError, match="revision 'local-1', this run's of 'local-0'"):
        remote(script, spec).encode(TEXTS[:1])


def test_a_text_that_the_service_refuses_is_its_rows_error(
    service: EncoderServer, encoded: list[EncodedPrompt], spec: FeatureSpec
) -> None:
    backend = remote(service, spec)
    with pytest.raises(RowError, match=r'refused the text: "xxx.*1,000,001 characters'):
        backend.encode(["a red cat", "x" * 1_000_001])
    assert are_equal(backend.encode(["a red cat"]), encoded[:1])


def test_a_proxy_is_not_asked(
    service: EncoderServer,
    encoded: list[EncodedPrompt],
    spec: FeatureSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with scripted_service() as proxy:
        proxy.answers = [Answer(200)]
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert are_equal(remote(service, spec).encode(TEXTS[:1]), encoded[:1])
        assert proxy.asked == []


# Tokens.


def test_a_token_is_asked_for_and_comes_from_the_environment(
    locked_service: EncoderServer,
    encoded: list[EncodedPrompt],
    spec: FeatureSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="RAYDIFF_ENCODER_TOKEN is not set here"):
        remote(locked_service, spec)
    monkeypatch.setenv(TOKEN_VARIABLE, "0123456789abcdeF")
    with pytest.raises(ConfigError, match="RAYDIFF_ENCODER_TOKEN is another one"):
        remote(locked_service, spec)
    monkeypatch.setenv(TOKEN_VARIABLE, f"{TOKEN}\n")
    assert are_equal(remote(locked_service, spec).encode(TEXTS[:1]), encoded[:1])
    monkeypatch.setenv(TOKEN_VARIABLE, "0123\n456")
    with pytest.raises(ConfigError, match="letters that a header cannot have"):
        remote(locked_service, spec)


@pytest.mark.parametrize(
    ("host", "token", "rule"),
    [
        ("0.0.0.0", None, "anyone who reaches this machine"),
        ("::", None, "anyone who reaches this machine"),
        ("", None, "anyone who reaches this machine"),
        ("no-such-host.invalid", None, "anyone who reaches this machine"),
        ("127.0.0.1", "short", "at least 16"),
        ("127.0.0.1", "with a space in the middle", "at least 16"),
        ("192.0.2.1", TOKEN, "cannot listen there"),
    ],
)
def test_a_server_that_anyone_could_ask_does_not_start(
    host: str, token: str | None, rule: str
) -> None:
    with pytest.raises(ConfigError, match=rule):
        EncoderServer(host, 0, token=token)


# What the server is asked.


def ask(
    server: EncoderServer, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, str]:
    """Return the status and the error of a reply."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    given = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body or None, given)
        response = connection.getresponse()
        content = json.loads(response.read())
        return response.status, content.get("error", "")
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "rule"),
    [
        ("/encode", b'{"texts": ["a"]}', {"Authorization": "Bearer no"}, 401, "a token is asked"),
        ("/encode", b'{"texts": ["a"]}', {"Authorization": ""}, 401, "a token is asked"),
        ("/other", b"{}", {}, 404, "GET /health and POST /encode"),
        ("/health", b"{}", {}, 404, "GET /health and POST /encode"),
        ("/encode", b"", {}, 411, "Content-Length"),
        ("/encode", b'{"texts": ["a"]}', {"Content-Type": "text/plain"}, 415, "application/json"),
        ("/encode", b"x" * (MAX_BODY_BYTES + 1), {}, 413, "at most 8,388,608"),
        ("/encode", b'{"texts": ', {}, 400, "not valid JSON"),
        ("/encode", b"[" * 100_000, {}, 400, "not valid JSON"),
        ("/encode", b"[]", {}, 400, "a list of strings"),
        ("/encode", b'{"texts": [1]}', {}, 400, "a list of strings"),
        ("/encode", b'{"texts": []}', {}, 413, "send 1 to 16"),
        ("/encode", json.dumps({"texts": ["a"] * 17}).encode(), {}, 413, "17 texts; send 1 to 16"),
        ("/encode", b'{"texts": ["\\ud800"]}', {}, 422, "not valid Unicode"),
        ("/encode", b"{}", {"Content-Length": "-1"}, 400, "not a number"),
    ],
)
def test_a_request_that_is_none_of_ours_is_refused_with_the_rule(
    locked_service: EncoderServer,
    path: str,
    body: bytes,
    headers: dict[str, str],
    status: int,
    rule: str,
) -> None:
    answer = ask(locked_service, "POST", path, body, **headers)
    assert answer[0] == status
    assert rule in answer[1]


def test_health_asks_for_the_token_too(locked_service: EncoderServer) -> None:
    assert ask(locked_service, "GET", "/health") == (200, "")
    assert ask(locked_service, "GET", "/health", Authorization="")[0] == 401


def test_an_error_inside_stays_inside(
    pipeline: LTX2Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = replace(pipeline.parts, tokenizer=object())  # type: ignore[arg-type]
    with encoder_service(tiny_pipeline(parts, "2.3")) as server:
        status, error = ask(server, "POST", "/encode", b'{"texts": ["a"]}')
    assert (status, error) == (500, "encoding failed: AttributeError")
    assert "Traceback" in capfd.readouterr().err


def test_a_gpu_that_failed_ends_the_service(pipeline: LTX2Pipeline) -> None:
    class Broken(LTX2Pipeline):
        def encode_texts(self, texts: Sequence[str]) -> list[EncodedPrompt]:
            raise torch.AcceleratorError("an illegal memory access\nwas met")

    broken = Broken(
        info=pipeline.info,
        components=pipeline.parts,
        profile=pipeline.profile,
        dtype=pipeline.dtype,
    )
    with EncoderServer("127.0.0.1", 0, token=None) as server:
        answers: list[tuple[int, str]] = []
        asking = Thread(
            target=lambda: answers.append(ask(server, "POST", "/encode", b'{"texts": ["a"]}'))
        )
        asking.start()
        with pytest.raises(EngineError, match=r"the GPU failed: an illegal memory access$"):
            server.serve(about_pipeline(broken), broken)
        asking.join()
    assert answers == [(500, "encoding failed: AcceleratorError")]


# Settings.


def test_only_an_allowed_host_is_asked() -> None:
    given = {"text_encoder": "api", "encoder_hosts": ("Encoder", "10.0.0.7", "::1")}
    for url, host, port in (
        ("http://encoder:8080", "encoder", 8080),
        ("http://ENCODER", "encoder", 80),
        ("https://10.0.0.7/ltx/", "10.0.0.7", 443),
        ("http://[::1]:9", "::1", 9),
    ):
        address = encoder_address(LTX2Config.model_validate({**given, "encoder_url": url}))
        assert (address.host, address.port) == (host, port)
    for url in ("http://encoder.evil.org", "http://other:8080", "http://10.0.0.70"):
        with pytest.raises(ValueError, match=r"If that is meant, set ltx2\.encoder_hosts=\["):
            LTX2Config.model_validate({**given, "encoder_url": url})


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"text_encoder": "precomputed"}, "Set ltx2.embeds"),
        ({"text_encoder": "api"}, "Set ltx2.encoder_url"),
        ({"embeds": "x"}, "an option of precomputed"),
        ({"text_encoder": "random", "encoder_url": "http://a"}, "an option of api"),
        ({"encoder_hosts": ["a"]}, "an option of api"),
        ({"text_encoder": "api", "encoder_url": "ftp://a"}, "expected http:// or https://"),
        ({"text_encoder": "api", "encoder_url": "a:8080"}, "expected http:// or https://"),
        ({"text_encoder": "api", "encoder_url": "http://a:b"}, "Port could not be cast"),
        ({"text_encoder": "api", "encoder_url": "http://[a"}, "Invalid IPv6"),
        ({"text_encoder": "api", "encoder_url": "http://a?b"}, "a query or a fragment"),
        ({"text_encoder": "api", "encoder_url": "http://me:pass@a"}, "RAYDIFF_ENCODER_TOKEN"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(rule)) as caught:
        load_config(overrides={"ltx2": values})
    assert "pass" not in str(caught.value).replace("password", "")


def test_only_what_the_run_encodes_itself_is_kept() -> None:
    values = {"ltx2.text_encoder": "random", "engine.embeds_on_disk": True}
    with pytest.raises(ConfigError, match="keeps what the run's own text encoders make"):
        load_config(overrides=values)
