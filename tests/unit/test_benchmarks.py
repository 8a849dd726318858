"""What the load test makes of streams; that it measures is seen by running it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import streams
from benchmarks.figures import Figures, StreamTimes, medians, percentile, summarize
from benchmarks.peers.results import Results, ServerResult
from benchmarks.prompts import Prompts
from loaderd.client import AsyncClient
from tests.fake_daemon import FakeDaemon


def figures(streams: int, speed: float, errors: dict[str, int] | None = None) -> Figures:
    return Figures(streams, 64, speed, 0.1, 0.2, 0.01, 0.02, errors or {})


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(200, 0, -1)]
    assert percentile(values, 50) == 100
    assert percentile(values, 99) == 198
    assert percentile([7], 99) == 7
    assert percentile([], 50) == 0


def test_streams_come_to_tokens_per_second_and_times() -> None:
    one = StreamTimes(sent=10, arrivals=[11, 12, 14], tokens=3)
    other = StreamTimes(sent=10, arrivals=[13, 15], tokens=4)
    load = summarize([one, other])
    assert load.tokens == 7
    assert load.tokens_per_second == 7 / 5
    assert (load.first_token_p50, load.first_token_p99) == (1, 3)
    assert (load.inter_token_p50, load.inter_token_p99) == (2, 2)
    assert load.errors == {}


def test_a_stream_that_failed_counts_as_an_error_alone() -> None:
    served = StreamTimes(sent=10, arrivals=[11], tokens=1)
    failed = StreamTimes(sent=10, arrivals=[12, 30], tokens=2, error="QueueFullError")
    load = summarize([served, failed, StreamTimes(sent=10, error="QueueFullError")])
    assert (load.streams, load.tokens, load.tokens_per_second) == (3, 1, 1)
    assert load.errors == {"QueueFullError": 2}


def test_streams_that_all_failed_have_no_speed() -> None:
    load = summarize([StreamTimes(sent=10, error="DeviceMemoryError")])
    assert load.tokens_per_second == 0
    assert load.first_token_p99 == 0


def test_of_rounds_the_median_counts_and_every_error() -> None:
    rounds = [figures(8, 90), figures(8, 300, {"WorkerCrashedError": 1}), figures(8, 100)]
    load = medians(rounds)
    assert load.tokens_per_second == 100
    assert load.streams == 8
    assert load.errors == {"WorkerCrashedError": 1}


def test_no_two_prompts_begin_alike() -> None:
    prompts = Prompts()
    texts = prompts.take(40) + prompts.take(60)
    assert len({text.split()[0] for text in texts}) == 100


def test_the_command_measures_each_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeDaemon() as daemon:
        options = ["--address", daemon.address, "--model", "demo/chat", "--streams", "1,4"]
        monkeypatch.setattr(sys, "argv", ["streams", *options, "--tokens", "5", "--json"])
        streams.main()
    loads = json.loads(capsys.readouterr().out)
    assert [(load["streams"], load["tokens"], load["errors"]) for load in loads] == [
        (1, 3 * 5, {}),
        (4, 3 * 4 * 5, {}),
    ]


async def test_what_the_sdk_raises_is_counted_by_its_name() -> None:
    with FakeDaemon() as daemon:
        async with AsyncClient(daemon.address) as client:
            model = await client.load("demo/chat")
            await model.unload()
            load = await streams.run_load(streams.SdkReader(model), ["a", "b"], 4)
    assert load.errors == {"ModelNotLoadedError": 2}


async def test_a_stream_with_other_tokens_than_asked_for_has_failed() -> None:
    async def read(prompt: str, _tokens: int) -> StreamTimes:
        return StreamTimes(sent=10, arrivals=[11, 12], tokens=len(prompt))

    load = await streams.run_load(read, ["ab", "abc"], 3)
    assert load.tokens == 3
    assert load.errors == {"2 tokens instead of 3": 1}


def test_results_are_kept_and_told(tmp_path: Path) -> None:
    ours = ServerResult("loaderd", 1.5, 0.0, [figures(1, 40), figures(8, 200)])
    other = ServerResult("other", 7.0, 0.5, [figures(1, 20), figures(8, 250)])
    results = Results({"model": "m", "request": "greedy"}, [ours, other])
    results.save(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results
    lines = results.markdown().splitlines()
    assert "| | start to ready | 1 stream | 8 streams |" in lines
    assert "| loaderd | 1.5 s | 40 | 200 |" in lines
    assert "| other | 7.0 s | 20 (2.00 x) | 250 (0.80 x) |" in lines
    assert "| other | 10 / 20 | 10 / 20 |" in lines
