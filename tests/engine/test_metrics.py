"""What Prometheus is told of a known run, and whether the dashboard asks for what there is."""

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest

from raydiff.config import validate
from raydiff.engine.cluster import private_session
from raydiff.engine.cluster_file import ClusterLayout
from raydiff.engine.metrics import METRICS, Metric, MetricsObserver
from raydiff.output.progress import Progress
from raydiff.request import RenderBatch

DASHBOARD = Path(__file__).parents[2] / "configs" / "grafana" / "raydiff.json"
BY_NAME = {metric.name: metric for metric in METRICS}
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}


class Recorder:
    """A sink that checks what it is told against the definitions, as Ray's does, and keeps it."""

    def __init__(self) -> None:
        self.totals: dict[tuple[str, ...], float] = defaultdict(float)
        self.values: dict[tuple[str, ...], list[float]] = defaultdict(list)

    def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        self.totals[self._key(name, labels, "counter")] += amount

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.totals[self._key(name, labels, "gauge")] = value

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.values[self._key(name, labels, "histogram")].append(value)

    def _key(self, name: str, labels: Mapping[str, str], kind: str) -> tuple[str, ...]:
        metric = BY_NAME[name]
        assert metric.kind == kind
        assert set(labels) == set(metric.labels)
        return (name.removeprefix("raydiff_"), *(labels[label] for label in metric.labels))


def test_a_fused_session() -> None:
    recorder = Recorder()
    observer = MetricsObserver(lambda _: recorder)
    import_module("run_story").tell_fused(observer)
    assert recorder.totals == {
        ("rows_total", "completed"): 4,
        ("rows_total", "failed"): 2,
        ("failures_total", "not a number"): 1,
        ("failures_total", "bad row"): 1,
        ("restarts_total", "process"): 1,
        ("batches_total", "fused"): 1,
        ("batch_rows_total", "fused"): 3,
        ("worker_seconds_total", "encode"): 1.0,
        ("worker_seconds_total", "denoise"): 8.0,
        ("worker_seconds_total", "decode"): 2.0,
        ("worker_seconds_total", "write"): 1.0,
        ("queue_length", "rows"): 3,
        ("workers", "fused", "ready"): 1,
        ("busy_seconds", "w0"): 3.0,
        ("gpu_utilization", "w0"): 0.5,
        ("vram_used_bytes", "w0"): 2**30,
        ("vram_peak_bytes", "w0"): 3 * 2**30,
        ("run_rows",): 9,
        ("run_rows_ended",): 6,
    }
    assert recorder.values == {
        ("stage_seconds", "encode"): [1.0],
        ("stage_seconds", "denoise"): [8.0],
        ("stage_seconds", "decode"): [2.0],
        ("stage_seconds", "write"): [1.0],
    }
    observer.close({})
    assert recorder.totals["workers", "fused", "ready"] == 0
    assert recorder.totals["gpu_utilization", "w0"] == 0
    assert recorder.totals["run_rows_ended",] == 6


def test_a_split_session(make_batch: Callable[[Sequence[str]], RenderBatch]) -> None:
    recorder = Recorder()
    observer = MetricsObserver(lambda _: recorder)
    import_module("run_story").tell_split(observer, make_batch(["a"]))
    observer.progress(Progress(state="running", done=1, failed=0, quarantined=0), {})
    assert recorder.totals["texts_total", "encoded"] == 1
    assert recorder.totals["texts_total", "disk"] == 1
    assert recorder.values["stage_seconds", "encode"] == [4.0]
    assert recorder.values["stage_seconds", "denoise"] == [3.0]
    assert recorder.totals["batch_rows_total", "encode"] == 3
    assert recorder.totals["batch_rows_total", "denoise_decode"] == 1


def test_what_was_counted_before_ray_was_there_is_told_later_and_once() -> None:
    recorder = Recorder()
    sinks = iter([None, recorder])
    observer = MetricsObserver(lambda _: next(sinks))
    story = import_module("run_story")
    observer.ended(story.DONE, 5)
    progress = Progress(state="running", done=5, failed=0, quarantined=0)
    for _ in range(4):
        observer.progress(progress, {})
    assert recorder.totals["rows_total", "completed"] == 5


def test_definitions_are_sound() -> None:
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"raydiff_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.boundaries) == (metric.kind == "histogram")
        assert list(metric.boundaries) == sorted(metric.boundaries)
        assert not {"request_id", "prompt", "row", "run"} & set(metric.labels)


def test_ray_exports_what_is_counted_and_on_loopback_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if find_spec("opentelemetry") is None and not os.environ.get("CI"):
        pytest.skip("ray[default] is not installed, whose agent exports metrics")
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    layout = validate(ClusterLayout, {"stages": {"fused": {"count": 1}}}, "layout")
    with private_session(layout) as session:
        observer = MetricsObserver(partial(session.metrics, run="mine"))
        story = import_module("run_story")
        observer.ended(story.DONE, 2)  # before there is a Ray
        node = session.open().nodes()[0]
        story.tell_fused(observer)
        observer.close({})
        port = node["MetricsExportPort"]
        exported = poll(f"http://127.0.0.1:{port}/metrics", "ray_raydiff_run_rows_ended")
        listening = {
            one.laddr.ip
            for one in psutil.net_connections()
            if one.status == "LISTEN" and one.laddr.port == port
        }
    assert listening == {"127.0.0.1"}
    kinds = dict(re.findall(r"^# TYPE ray_(raydiff_\w+) (\w+)$", exported, re.MULTILINE))
    told = BY_NAME.keys() - {"raydiff_texts_total"}  # which a fused run does not have
    assert kinds == {name: BY_NAME[name].kind for name in told}
    assert value(exported, "raydiff_rows_total", run="mine", status="completed") == 6
    assert value(exported, "raydiff_rows_total", run="mine", status="failed") == 2
    assert value(exported, "raydiff_worker_seconds_total", run="mine", stage="denoise") == 8.0
    assert value(exported, "raydiff_stage_seconds_count", run="mine", stage="denoise") == 1
    assert value(exported, "raydiff_workers", run="mine", role="fused", state="ready") == 0


def poll(url: str, awaited: str) -> str:
    """Return what an endpoint answers as soon as it has what is awaited."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with suppress(OSError), urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
            if awaited in text:
                return text
        time.sleep(0.2)
    raise AssertionError(f"{url}: no {awaited}")


def value(exported: str, name: str, **labels: str) -> float:
    """Return the one sample of a metric that has these labels."""
    found = [
        line
        for line in exported.splitlines()
        if line.startswith(f"ray_{name}{{")
        and all(f'{label}="{text}"' in line for label, text in labels.items())
    ]
    assert len(found) == 1, found
    return float(found[0].rpartition(" ")[2])


# -- the dashboard ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return content


def test_the_dashboard_is_one_that_grafana_takes(dashboard: dict[str, Any]) -> None:
    assert isinstance(dashboard["schemaVersion"], int)
    assert dashboard["title"] == dashboard["uid"] == "raydiff"
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {
        "datasource",
        "run",
    }
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["type"] in ("timeseries", "stat")
            assert panel["datasource"]["uid"] == "${datasource}"
            references = [target["refId"] for target in panel["targets"]]
            assert references == sorted(set(references))


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are(
    dashboard: dict[str, Any],
) -> None:
    exported = {
        f"ray_{metric.name}{suffix}": metric
        for metric in METRICS
        for suffix in SUFFIXES[metric.kind]
    }
    asked: set[str] = set()
    for target in targets(dashboard):
        expression = target["expr"]
        names = re.findall(r"ray_\w+", expression)
        assert names, expression
        assert set(names) <= set(exported), expression
        assert expression.count('{run=~"$run"}') == len(names)
        assert expression.count("(") == expression.count(")")
        asked |= {exported[name].name for name in names}
        metric: Metric = exported[names[0]]
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        used = {label.strip() for group in grouped for label in group.split(",")}
        used |= set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert used - {"le"} <= set(metric.labels), expression
    assert asked == set(BY_NAME), "a metric that no panel shows"


def targets(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [target for panel in dashboard["panels"] for target in panel.get("targets", ())]
