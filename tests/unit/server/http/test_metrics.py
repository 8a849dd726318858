from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import grpc
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from loaderd.server import errors
from loaderd.server.http.metrics import catalog
from loaderd.server.http.metrics.catalog import Metric
from loaderd.v1.model_pb2 import ModelStatistics
from loaderd.worker.v1.worker_pb2 import EngineReport
from tests.unit.server.box import Box, open_box
from tests.unit.server.http.browser import fetch
from tests.waiting import until_in_loop

ROOT = Path(__file__).parents[4]
DASHBOARD = ROOT / "deploy" / "grafana" / "loaderd.json"
CATALOG = [each for each in vars(catalog).values() if isinstance(each, Metric)]

Samples = dict[tuple[str, tuple[str, ...]], float]


async def scrape(box: Box) -> Samples:
    """Values by name and the values of labels, in the order of the labels' names."""
    reply = await fetch(box.url, "/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


async def test_times_of_requests(box: Box, openai: AsyncOpenAI) -> None:
    await box.load()
    name = str(box.folder)
    async for _ in box.stream("count 5"):
        pass
    await openai.completions.create(model=name, prompt="count 3")
    samples = await scrape(box)
    assert samples["loaderd_queue_seconds_count", (name,)] == 2
    assert samples["loaderd_time_to_first_token_seconds_count", (name,)] == 2
    # Between the texts of a request; some of them may have come together.
    assert 1 <= samples["loaderd_inter_token_seconds_count", (name,)] <= 6


async def test_what_engines_report(box: Box) -> None:
    await box.load()
    worker, name = box.launcher.workers[0], (str(box.folder),)
    assert ("loaderd_kv_capacity_tokens", name) not in await scrape(box)  # no bound is known
    worker.report(
        EngineReport(
            prompt_tokens=30,
            cached_prompt_tokens=20,
            generated_tokens=10,
            kv_tokens=300,
            kv_capacity_tokens=1000,
        )
    )
    await until_in_loop(lambda: _statistics(box).kv_tokens == 300)
    samples = await scrape(box)
    assert samples["loaderd_prompt_tokens_total", name] == 30
    assert samples["loaderd_cached_prompt_tokens_total", name] == 20
    assert samples["loaderd_generated_tokens_total", name] == 10
    assert samples["loaderd_kv_tokens", name] == 300
    assert samples["loaderd_kv_capacity_tokens", name] == 1000


def _statistics(box: Box) -> ModelStatistics:
    (view,) = box.registry.views()
    assert view.statistics is not None
    return view.statistics


async def test_requests_that_wait_and_run(box: Box) -> None:
    await box.load()
    name = (str(box.folder),)
    assert (await scrape(box))["loaderd_running_requests", name] == 0
    calls = [box.stream("hang") for _ in range(2)]
    for call in calls:
        await anext(aiter(call))
    samples = await scrape(box)
    assert samples["loaderd_running_requests", name] == 2
    assert samples["loaderd_queued_requests", name] == 0
    assert samples["loaderd_model_active_requests", name] == 2
    for call in calls:
        call.cancel()
    await until_in_loop(lambda: box.registry.views()[0].active_requests == 0)
    assert (await scrape(box))["loaderd_running_requests", name] == 0


async def test_the_series_of_a_model_go_with_it(box: Box) -> None:
    await box.load()
    name = str(box.folder)
    async for _ in box.stream("count 5"):
        pass
    assert any(name in labels for _, labels in await scrape(box))
    await box.registry.unload(name, force=False)
    samples = await scrape(box)
    assert not any(name in labels for _, labels in samples)
    assert samples["loaderd_unloads_total", ("unload",)] == 1


async def test_calls_by_method_and_code(box: Box) -> None:
    await box.list()
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in box.stream("count 1", model="org/none"):
            pass
    await box.load()
    hanging = box.stream("hang")
    await anext(aiter(hanging))
    hanging.cancel()
    stream = "loaderd.v1.GenerationService/StreamGenerate"
    await until_in_loop(lambda: box.registry.views()[0].active_requests == 0)
    await fetch(box.url, "/v1/models/org/none")
    await fetch(box.url, "/nowhere/to/go")
    samples = await scrape(box)
    calls = "loaderd_rpc_requests_total"
    assert samples[calls, ("OK", "loaderd.v1.ModelService/ListModels")] == 1
    assert samples[calls, ("FAILED_PRECONDITION", stream)] == 1
    assert samples[calls, ("CANCELLED", stream)] == 1
    requests = "loaderd_http_requests_total"
    assert samples[requests, ("404", "/v1/models/{model}")] == 1
    assert samples[requests, ("404", "other")] == 1


async def test_loads_that_end_well_or_not(box: Box) -> None:
    box.launcher.load_error = errors.DeviceMemoryError(model="fake")
    with pytest.raises(grpc.aio.AioRpcError):
        await box.load()
    box.launcher.load_error = None
    await box.load()
    samples = await scrape(box)
    assert samples["loaderd_loads_total", ("failed",)] == 1
    assert samples["loaderd_loads_total", ("ready",)] == 1
    assert samples["loaderd_load_seconds_count", ("total",)] == 1
    assert samples["loaderd_load_seconds_count", ("weights",)] == 1
    assert samples["loaderd_models", ("ready",)] == 1


async def test_workers_that_die_and_come_back(tmp_path: Path) -> None:
    async with open_box(tmp_path, restart_wait_s=0.01, http=True) as box:
        await box.load()
        box.launcher.workers[0].kill()
        await until_in_loop(lambda: box.launcher.loads == 2)
        await until_in_loop(lambda: box.registry.views()[0].state.value == "ready")
        samples = await scrape(box)
    assert samples["loaderd_worker_deaths_total", ()] == 1
    assert samples["loaderd_worker_restarts_total", ()] == 1
    assert samples["loaderd_loads_total", ("ready",)] == 2


async def test_devices_and_cache(box: Box) -> None:
    await box.load()  # a worker has told the devices
    samples = await scrape(box)
    assert samples["loaderd_device_memory_bytes", ("cpu",)] > 0
    assert samples["loaderd_device_memory_free_bytes", ("cpu",)] > 0
    assert samples["loaderd_cache_bytes", ()] == 0
    assert samples["loaderd_cache_disk_free_bytes", ()] > 0


async def test_a_scrape_waits_for_no_worker(tmp_path: Path) -> None:
    async with open_box(tmp_path, http=True) as box:
        box.launcher.standby_gate.clear()
        async with asyncio.timeout(10):
            await scrape(box)


async def test_every_metric_is_told_as_the_catalog_has_it(box: Box, openai: AsyncOpenAI) -> None:
    await box.load()
    await openai.completions.create(model=str(box.folder), prompt="count 3")
    text = (await fetch(box.url, "/metrics")).text
    told = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE loaderd_")}
    # There is no limit, and so no series of it.
    assert told == {each.name for each in CATALOG} - {catalog.CACHE_LIMIT.name}


@pytest.mark.parametrize("metric", CATALOG, ids=lambda metric: metric.name)
def test_names_are_as_prometheus_wants_them(metric: Metric) -> None:
    assert re.fullmatch(r"loaderd(_[a-z]+)+", metric.name)
    assert metric.help.endswith(".")
    # Of what has a unit, the name ends in it; "total" is for what only grows.
    assert not re.search(r"(millis|_ms|_mb|_gb|_kb|_minutes)", metric.name)
    assert set(metric.labels) <= {
        *("model", "state", "phase", "outcome", "reason", "device"),
        *("method", "route", "code", "version"),
    }


def test_the_docs_list_every_metric() -> None:
    rows = re.findall(
        r"^\| `(loaderd_\w+)` \|", (ROOT / "docs" / "http.md").read_text(), re.MULTILINE
    )
    assert rows == [each.name for each in CATALOG]


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    asked = set(re.findall(r"\bloaderd_\w+", " ".join(queries)))
    known = {each.name for each in CATALOG if not each.buckets}
    known |= {
        f"{each.name}_{part}"
        for each in CATALOG
        if each.buckets
        for part in ("bucket", "count", "sum")
    }
    assert asked
    assert asked <= known
    labels = {name for each in CATALOG for name in each.labels} | {"le", "job", "instance"}
    by = {
        name
        for query in queries
        for group in re.findall(r"by \(([^)]*)\)", query)
        for name in group.replace(",", " ").split()
    }
    assert by <= labels
