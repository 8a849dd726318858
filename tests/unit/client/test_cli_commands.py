"""What the commands print, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loaderd.cli.exits import ExitCode
from loaderd.cli.options import DtypeName, OffloadName, QuantizationName
from loaderd.client import Client, Dtype, Offload, Quantization
from tests.fake_daemon import FakeDaemon
from tests.fake_daemon.models import FREED_BYTES, WEIGHT_BYTES
from tests.unit.client.ctl import Ctl, document


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_load_tells_progress_on_stderr_and_the_model_on_stdout(ctl: Ctl) -> None:
    result = ctl("load", "demo/remote")

    assert result.exit_code == ExitCode.OK
    ready = "demo/remote is ready as m-1, bfloat16 on cpu"
    assert result.stdout == f"{ready}, loaded in 0.0 s (resolve 5 ms, weights 15 ms)\n"
    progress = result.stderr.splitlines()
    assert progress[0] == "loaderctl: demo/remote: resolving"
    assert (
        "loaderctl: demo/remote: downloading 8.0 MB of 40.0 MB, 25.0 MB/s, 1.3 s left" in progress
    )
    assert progress[-1] == "loaderctl: demo/remote: loading"
    assert "\x1b" not in result.output  # no bars where there is no terminal


def test_load_tells_that_it_reads_files_to_hash_them(ctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.cache.unhashed = {"demo/chat"}

    progress = ctl("load", "demo/chat").stderr.splitlines()

    assert progress[-2:] == [
        "loaderctl: demo/chat: verifying 40.0 MB of 40.0 MB, 500.0 MB/s",
        "loaderctl: demo/chat: loading",
    ]


def test_load_of_a_model_that_is_there_says_so(ctl: Ctl) -> None:
    ctl("load", "demo/chat")

    again = ctl("load", "demo/chat")

    assert again.stdout == "demo/chat is ready as m-1, bfloat16 on cpu, was loaded already\n"
    assert again.stderr == ""


def test_load_with_options_as_json(ctl: Ctl, daemon: FakeDaemon) -> None:
    model = document(
        ctl(
            "load",
            "demo/base",
            "--dtype",
            "float32",
            "--device-map",
            "cpu",
            "--json",
            "--quantization",
            "int8",
        )
    )

    sent = daemon.last("LoadModel").request.options
    assert (sent.dtype, sent.device_map) == (Dtype.FLOAT32, "cpu")
    assert sent.quantization == Quantization.INT8
    assert model["state"] == "ready"
    assert model["source"] == "cached"
    assert model["options"] == {
        "dtype": "float32",
        "device_map": "cpu",
        "quantization": "int8",
        "max_memory": {},
        "offload": None,
    }
    assert model["details"]["quantization"] == "int8"
    assert model["details"]["weight_bytes"] == WEIGHT_BYTES
    assert model["timings"]["total"] == 0.025
    assert model["timings"]["download"] is None
    assert model["created_at"].endswith("+00:00")


def test_the_dtypes_are_those_of_the_sdk() -> None:
    assert {name.value for name in DtypeName} == {
        dtype.name.lower() for dtype in Dtype if dtype is not Dtype.UNSPECIFIED
    }


def test_the_quantizations_are_those_of_the_sdk() -> None:
    assert {name.value for name in QuantizationName} == {
        member.name.lower() for member in Quantization if member is not Quantization.UNSPECIFIED
    }


def test_the_offloads_are_those_of_the_sdk() -> None:
    assert {name.value for name in OffloadName} == {
        member.name.lower() for member in Offload if member is not Offload.UNSPECIFIED
    }


def test_bounds_and_where_layers_may_go(ctl: Ctl, daemon: FakeDaemon) -> None:
    bounds = ("--max-memory", "cpu=10GiB", "--max-memory", "mps=0B", "--offload", "disk")
    model = document(ctl("load", "demo/chat", "--device-map", "sequential", *bounds, "--json"))

    sent = daemon.last("LoadModel").request.options
    assert sent.device_map == "sequential"
    assert dict(sent.max_memory) == {"cpu": 10 << 30, "mps": 0}
    assert sent.offload == Offload.DISK
    assert model["options"]["max_memory"] == {"cpu": 10 << 30, "mps": 0}
    assert model["options"]["offload"] == "disk"


def test_a_device_for_each_module(ctl: Ctl, daemon: FakeDaemon) -> None:
    where = ("--device-map", "=cpu", "--device-map", "model.layers.1=disk")
    planned = ctl("plan", "demo/chat", *where)
    assert planned.exit_code == ExitCode.OK
    assert "on the disk, at most" in planned.stdout
    assert "in main memory" not in planned.stdout
    loaded = ctl("load", "demo/chat", *where)

    sent = daemon.last("LoadModel").request.options
    assert dict(sent.module_map) == {"": "cpu", "model.layers.1": "disk"}
    assert not sent.HasField("device_map")
    assert "on cpu+disk, 19.0 MB of it offloaded" in loaded.stdout


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--device-map", "cpu", "--device-map", "model=cpu"], "give one place, or MODULE=DEVICE"),
        (["--device-map", "a=cpu", "--device-map", "a=disk"], "given twice"),
        (["--max-memory", "10GiB"], "DEVICE=SIZE"),
        (["--max-memory", "cpu=much"], "no size"),
        (["--max-memory", "cpu=1GB", "--max-memory", "cpu=2GB"], "given twice"),
        (["--offload", "tape"], "tape"),
    ],
)
def test_where_that_cannot_be_meant_is_wrong_usage(
    ctl: Ctl, words: list[str], problem: str
) -> None:
    refused = ctl("load", "demo/chat", *words)
    assert refused.exit_code == ExitCode.USAGE
    assert problem in " ".join(refused.stderr.replace("│", " ").split())


def test_load_tells_that_weights_are_quantized(ctl: Ctl) -> None:
    loaded = ctl("load", "demo/chat", "--quantization", "nf4")

    assert loaded.stdout.startswith("demo/chat is ready as m-1, bfloat16, nf4 weights on cpu")


def test_a_local_path_is_made_absolute(
    ctl: Ctl, daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)

    assert ctl("load", "./model").exit_code == ExitCode.OK
    assert daemon.last("LoadModel").request.model == str(tmp_path / "model")


def test_unload_says_what_it_freed(ctl: Ctl) -> None:
    ctl("load", "demo/chat")
    assert ctl("unload", "demo/chat").stdout == "unloaded demo/chat, 123.5 MB freed\n"

    ctl("load", "demo/chat")
    result = document(ctl("unload", "demo/chat", "--json"))
    assert result["freed_bytes"] == FREED_BYTES
    assert result["model"]["state"] == "unloaded"


def test_unload_that_freed_nothing_says_nothing_of_it(ctl: Ctl, daemon: FakeDaemon) -> None:
    ctl("load", "demo/chat")
    daemon.models.freed_bytes = 0

    assert ctl("unload", "demo/chat").stdout == "unloaded demo/chat\n"


def test_unload_of_a_busy_model_needs_force(ctl: Ctl, daemon: FakeDaemon, client: Client) -> None:
    stream = client.load("demo/chat").stream("x", max_new_tokens=50_000)
    next(stream)

    refused = ctl("unload", "demo/chat")
    forced = ctl("unload", "demo/chat", "--force")

    assert refused.exit_code == ExitCode.PRECONDITION
    assert forced.exit_code == ExitCode.OK


def test_ps_lists_models(ctl: Ctl) -> None:
    nothing = ctl("ps")
    assert (nothing.exit_code, nothing.stdout) == (ExitCode.OK, "")
    assert "no models are loaded" in nothing.stderr
    assert document(ctl("ps", "--json")) == []

    ctl("load", "demo/chat")
    ctl("load", "demo/base", "--dtype", "float16")

    heading, first, second = lines(ctl("ps").stdout)
    columns = ["NAME", "ID", "STATE", "DTYPE", "DEVICE"]
    columns += ["REPLICAS", "WEIGHTS", "REQUESTS", "READY", "UNTIL"]
    assert heading == columns
    assert first[:9] == ["demo/chat", "m-1", "ready", "bfloat16", "cpu", "1", "38.0", "MB", "0"]
    assert second[:4] == ["demo/base", "m-2", "ready", "float16"]
    assert [model["name"] for model in document(ctl("ps", "--json"))] == ["demo/chat", "demo/base"]


def test_load_and_ps_tell_of_replicas(ctl: Ctl, daemon: FakeDaemon) -> None:
    assert ctl("load", "demo/chat", "--replicas", "3").stdout == (
        "demo/chat is ready as m-1, bfloat16 on cpu, 3 replicas, "
        "loaded in 0.0 s (resolve 5 ms, weights 15 ms)\n"
    )
    ready = "demo/chat is ready as m-1, bfloat16 on cpu, "
    fewer = ctl("load", "demo/chat", "--replicas", "2").stdout
    assert fewer == f"{ready}2 replicas, was loaded already\n"
    more = ctl("load", "demo/chat", "--replicas", "3").stdout
    assert more.startswith(f"{ready}3 replicas, more of them loaded in ")
    assert lines(ctl("ps").stdout)[1][5] == "3"
    with daemon.models.in_use("demo/chat") as model:
        del model.replicas[0]
        model.replicas[0].leaving = True
    assert lines(ctl("ps").stdout)[1][5:8] == ["1", "of", "3"]
    planned = document(ctl("plan", "demo/chat", "--replicas", "2", "--json"))
    assert planned["needed_bytes"] == 120_000_000
    assert ["needed", "by", "2", "120.0", "MB"] in lines(
        ctl("plan", "demo/chat", "--replicas", "2").stdout
    )
    assert ctl("load", "demo/chat", "--replicas", "0").exit_code == ExitCode.USAGE
    assert ctl("load", "demo/chat", "--replicas", "33").exit_code == ExitCode.INVALID


def test_ps_tells_until_when_a_model_stays(ctl: Ctl, client: Client) -> None:
    ctl("load", "demo/chat", "--keep-alive", "always")
    ctl("load", "demo/base", "--keep-alive", "2h")

    _, pinned, idle = ctl("ps").stdout.splitlines()
    assert pinned.rstrip().endswith("pinned")
    assert "in 1 h 59 min" in idle or "in 2 h 0 min" in idle
    client.model("demo/base").lease(60)
    assert ctl("ps").stdout.splitlines()[2].rstrip().endswith("1 lease")
    refused = ctl("unload", "demo/base")
    assert refused.exit_code == ExitCode.PRECONDITION
    assert ctl("unload", "demo/base", "--grace", "5s").exit_code == ExitCode.USAGE
    assert ctl("unload", "demo/base", "--force", "--grace", "5s").exit_code == ExitCode.OK


@pytest.mark.parametrize("text", ["forever", "5", "-1", ""])
def test_a_keep_alive_that_is_none_is_refused(ctl: Ctl, text: str) -> None:
    refused = ctl("load", "demo/chat", f"--keep-alive={text}")
    assert refused.exit_code == ExitCode.USAGE
    assert "always" in refused.stderr


def test_a_table_is_not_cut_where_there_is_no_terminal(
    ctl: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    ctl("load", str(folder))

    _, row = ctl("ps").stdout.splitlines()

    assert row.startswith(str(folder))


def test_info_health_and_devices(ctl: Ctl, daemon: FakeDaemon) -> None:
    shown = dict(line.split("  ", 1) for line in ctl("info").stdout.splitlines())
    assert shown["version"].strip() == "0.1.0"
    assert shown["uptime"].strip() == "1 min 2 s"
    assert shown["address"].strip() == daemon.address
    info = document(ctl("info", "--json"))
    assert (info["uptime"], info["pid"], info["offline"]) == (61.5, 4242, False)

    assert ctl("health").stdout == "serving\n"
    unknown = ctl("health", "nothing", "--json")
    assert unknown.exit_code == ExitCode.NOT_FOUND
    assert json.loads(unknown.stdout) == {"service": "nothing", "status": "service_unknown"}
    daemon.set_health("", serving=False)
    down = ctl("health")
    assert (down.exit_code, down.stdout) == (ExitCode.UNAVAILABLE, "not serving\n")

    heading, gpu, cpu = lines(ctl("devices").stdout)
    assert " ".join(heading) == "ID TYPE NAME MEMORY FREE RESERVED AVAILABLE CORES"
    assert " ".join(gpu) == "cuda:0 cuda Fake GPU 85.9 GB 75.2 GB 0 B 75.2 GB -"
    assert cpu[-1] == "8"
    devices = document(ctl("devices", "--json"))
    assert [device["type"] for device in devices] == ["cuda", "cpu"]
    assert devices[0]["free_bytes"] == 70 << 30


def test_devices_say_who_has_their_memory(ctl: Ctl) -> None:
    ctl("load", "demo/chat")
    assert ctl("devices").stdout.splitlines()[-1] == "cpu: 52.0 MB demo/chat (m-1)"
    cpu = document(ctl("devices", "--json"))[-1]
    assert cpu["reserved_bytes"] == 52_000_000
    assert cpu["holders"] == [{"model_id": "m-1", "name": "demo/chat", "bytes": 52_000_000}]
    assert document(ctl("ps", "--json"))[0]["details"]["memory_bytes"] == 52_000_000


def test_a_plan_says_what_a_load_takes_and_exits_by_whether_it_fits(ctl: Ctl) -> None:
    result = ctl("plan", "demo/chat", "--dtype", "float32", "--device-map", "cpu")
    assert result.exit_code == ExitCode.OK
    told = [line.split("  ", 1) for line in result.stdout.splitlines()]
    shown = {name.strip(): text.strip() for name, text in told}
    assert shown["fits"] == "yes, on cpu (60.0 MB)"
    assert shown["dtype"] == "float32: asked for"
    assert shown["weights"] == "38.0 MB"
    assert shown["keys and values of 4096 tokens"] == "2.0 MB"
    assert "held by" not in shown

    ctl("load", "demo/chat")
    full = ctl("plan", "demo/base")
    assert full.exit_code == ExitCode.EXHAUSTED
    assert full.stdout.splitlines()[0].split() == ["fits", "no"]
    assert "demo/chat (52.0 MB)" in full.stdout
    assert "not counted" in full.stdout
    planned = ctl("plan", "demo/base", "--json")
    assert planned.exit_code == ExitCode.EXHAUSTED
    assert json.loads(planned.stdout)["breakdown"]["weights_bytes"] == 38_000_000


def test_a_plan_of_what_is_not_cached_is_not_found(ctl: Ctl) -> None:
    assert ctl("plan", "demo/remote").exit_code == ExitCode.NOT_FOUND


def test_run_answers_on_stdout(ctl: Ctl, daemon: FakeDaemon) -> None:
    result = ctl("run", "demo/chat", "hello")

    assert result.exit_code == ExitCode.OK
    assert result.stdout == "[1] you said: hello\n"
    assert "loading" in result.stderr
    assert daemon.last("StreamGenerate").request.HasField("messages")


def test_run_passes_its_options_on(ctl: Ctl, daemon: FakeDaemon) -> None:
    options = "--max-new-tokens 9 --temperature 0.5 --top-p 0.9 --top-k 3 --seed 7"
    result = ctl("run", "demo/chat", "hi", *options.split(), "--stop", "a", "--stop", "bc")

    request = daemon.last("StreamGenerate").request
    assert result.exit_code == ExitCode.OK
    assert (request.max_new_tokens, request.temperature, request.seed) == (9, 0.5, 7)
    assert (request.top_p, request.top_k, list(request.stop)) == (0.9, 3, ["a", "bc"])


def test_run_leaves_what_is_not_given_to_the_model(ctl: Ctl, daemon: FakeDaemon) -> None:
    ctl("run", "demo/chat", "hi")

    given = {field.name for field, _ in daemon.last("StreamGenerate").request.ListFields()}
    assert given == {"model", "messages"}


def test_run_begins_with_the_system_message(ctl: Ctl, daemon: FakeDaemon) -> None:
    result = ctl("run", "demo/chat", "hi", "--system", "Be brief.")

    messages = daemon.last("StreamGenerate").request.messages.messages
    assert [(m.role, m.content) for m in messages] == [("system", "Be brief."), ("user", "hi")]
    assert result.stdout == "[2] you said: hi\n"


@pytest.mark.parametrize("args", [("demo/base",), ("demo/chat", "--raw")])
def test_run_continues_text(ctl: Ctl, daemon: FakeDaemon, args: tuple[str, ...]) -> None:
    result = ctl("run", *args, "Once", "--max-new-tokens", "5")

    assert result.exit_code == ExitCode.OK
    assert daemon.last("StreamGenerate").request.text == "Once"


@pytest.mark.parametrize("args", [(), ("-",)])
def test_run_reads_the_prompt_from_stdin(ctl: Ctl, args: tuple[str, ...]) -> None:
    result = ctl("run", "demo/chat", *args, stdin="two\nlines\n")

    assert result.stdout == "[1] you said: two\nlines\n"


def test_run_with_a_prompt_leaves_stdin_alone(ctl: Ctl) -> None:
    assert ctl("run", "demo/chat", "hi", stdin="other").stdout == "[1] you said: hi\n"


def test_run_uses_a_model_that_is_loaded_whatever_its_options(ctl: Ctl, daemon: FakeDaemon) -> None:
    ctl("load", "demo/chat", "--dtype", "float32")

    by_name, by_id = ctl("run", "demo/chat", "hi"), ctl("run", "m-1", "hi")

    assert by_name.stdout == by_id.stdout == "[1] you said: hi\n"
    assert len(daemon.models.all()) == 1


def test_run_prints_statistics(ctl: Ctl) -> None:
    result = ctl("run", "demo/chat", "hi", "--stats")

    last = result.stderr.splitlines()[-1]
    assert last == (
        "loaderctl: 20 prompt tokens, 17 generated, 32.0 tokens/s, first token after 25 ms, "
        "ended by stop, seed 4711"
    )


def test_run_tells_the_default_limit_with_the_statistics_only(ctl: Ctl) -> None:
    note = "loaderctl: stopped at 256 tokens; --max-new-tokens for more"
    quiet = ctl("run", "demo/base", "Once")
    with_stats = ctl("run", "demo/base", "Once", "--stats")
    asked_for = ctl("run", "demo/base", "Once", "--stats", "--max-new-tokens", "256")

    assert quiet.stdout == with_stats.stdout == asked_for.stdout
    assert with_stats.stderr.splitlines()[-1] == note
    assert "stopped" not in quiet.stderr + asked_for.stderr


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("--system", "x", "--raw"), ExitCode.USAGE, "--system"),
        (("--temperature", "101"), ExitCode.INVALID, "temperature"),
        (("--seed", "-1"), ExitCode.INVALID, "seed"),
    ],
)
def test_run_refuses_what_makes_no_sense(
    ctl: Ctl, args: tuple[str, ...], code: ExitCode, text: str
) -> None:
    result = ctl("run", "demo/chat", "hi", *args)

    assert result.exit_code == code
    assert text in result.stderr.splitlines()[-1]


def test_run_refuses_a_system_message_without_chat_template(ctl: Ctl) -> None:
    result = ctl("run", "demo/base", "hi", "--system", "x")

    assert result.exit_code == ExitCode.INVALID
    assert "no chat template" in result.stderr


def test_a_failure_in_mid_answer_stands_on_a_line_of_its_own(
    daemon: FakeDaemon, client: Client
) -> None:
    model = client.load("demo/base")
    asked = ("run", "demo/base", "x", "--max-new-tokens", "50000")
    with subprocess.Popen(
        [sys.executable, "-m", "loaderd.cli", "-a", daemon.address, *asked],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        begun = process.stdout.read(5)
        model.unload(force=True)
        *answer, last = (begun + process.stdout.read()).splitlines()

    assert len(answer) == 1
    assert last.startswith("loaderctl: model unloaded")


def test_watch_begins_with_what_is_there(ctl: Ctl, client: Client) -> None:
    client.load("demo/base")

    result = ctl("--timeout", "0.5", "watch")

    assert result.stdout.splitlines() == ["demo/base (m-1): ready"]
    assert result.exit_code == ExitCode.DEADLINE


def test_watch_as_json_is_an_object_a_line(daemon: FakeDaemon, client: Client) -> None:
    command = [sys.executable, "-m", "loaderd.cli", "-a", daemon.address, "watch", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        client.load("demo/chat").unload()
        events = [json.loads(process.stdout.readline()) for _ in range(5)]
        process.terminate()

    assert first == {"type": "list", "models": []}
    assert {event["type"] for event in events} == {"event"}
    assert [event["model"]["state"] for event in events] == [
        "resolving",
        "loading",
        "ready",
        "unloading",
        "unloaded",
    ]
    assert [event["previous_state"] for event in events][:2] == ["unspecified", "resolving"]
    assert [event["sequence"] for event in events] == [1, 2, 3, 4, 5]
