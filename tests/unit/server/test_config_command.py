"""`loaderd config`, as an operator runs it."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from loaderd.server.cli import main
from loaderd.server.config import ServerConfig, load_config


@dataclass
class Run:
    """How the command ended, and what it printed."""

    code: int
    stdout: str
    stderr: str


Config = Callable[..., Run]


@pytest.fixture
def config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Config:
    for name in [name for name in os.environ if name.startswith(("LOADERD_", "HF_", "OTEL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def config(*arguments: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["loaderd", "config", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Run(int(ended.value.code or 0), *capsys.readouterr())

    return config


FILE = """\
port = 7
listen = ["unix:/tmp/s"]
socket_mode = 0o660
keep_alive = 60
clients = "clients.toml"

[[models]]
name = "org/name"
max_memory = { cpu = "1GiB" }
"""


def test_good_settings_are_in_order(config: Config, tmp_path: Path) -> None:
    assert config("check").stdout == "the settings are in order (file: none)\n"
    (tmp_path / "a.toml").write_text(FILE)
    (tmp_path / "clients.toml").write_text("")
    done = config("check", "--config", "a.toml")
    assert (done.code, done.stderr) == (0, "")
    assert "a.toml" in done.stdout


def test_all_problems_are_told_with_where_they_are_from(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.toml").write_text('prot = 1\nstandby = -1\n[[models]]\nname = "a/b"\nx = 1\n')
    monkeypatch.setenv("LOADERD_KEEP_ALIVE", "long")
    monkeypatch.setenv("LOADERD_STANDY", "1")
    done = config("check", "--config", "a.toml", "--log-level", "loud")
    assert (done.code, done.stdout) == (2, "")
    told = sorted(done.stderr.splitlines())
    for line, says in zip(
        told,
        [
            ("LOADERD_STANDY: there is no such setting; perhaps standby is meant",),
            ("keep_alive: ", "number", "LOADERD_KEEP_ALIVE"),
            ("log_level: ", "'info'", "--log-level"),
            ("models.0.x: there is no such setting", "a.toml"),
            ("prot: there is no such setting; perhaps port is meant", "a.toml"),
            ("standby: ", "greater than or equal to 0", "a.toml"),
        ],
        strict=True,
    ):
        assert line.startswith(f"loaderd: {says[0]}")
        assert all(each in line for each in says)


def test_models_in_a_variable(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADERD_MODELS", '[{"name": "org/name"}]')
    assert config("check").code == 0
    monkeypatch.setenv("LOADERD_MODELS", "org/name")
    done = config("check")
    assert done.code == 2
    assert '"models"' in done.stderr
    assert "must be JSON" in done.stderr


def test_files_that_settings_name_are_read(config: Config, tmp_path: Path) -> None:
    (tmp_path / "clients.toml").write_text("[[clients]]\nname = 3\n")
    (tmp_path / "no.pem").write_text("no")
    done = config(
        *("check", "--clients", "clients.toml", "--tls-cert", "no.pem", "--tls-key", "no.pem"),
        *("--hub-token-file", "none", "--preload", "a/b", "--deny-model", "a/*"),
    )
    assert done.code == 2
    keys = ["clients", "hub_token_file", "preload", "tls_cert, tls_key"]
    assert sorted(line.split(": ")[1] for line in done.stderr.splitlines()) == keys


@pytest.mark.parametrize("command", ["check", "show"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no file"),
        (b"port = ", "is not TOML"),
        (b"\xff", "is not text"),
    ],
)
def test_a_file_that_cannot_be_read(
    config: Config, tmp_path: Path, command: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "a.toml").write_bytes(content)
    done = config(command, "--config", "a.toml")
    assert (done.code, done.stdout) == (2, "")
    assert "config: " in done.stderr
    assert says in done.stderr


def test_it_shows_what_is_in_effect_and_where_it_is_from(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.toml").write_text(FILE)
    monkeypatch.setenv("LOADERD_PORT", "8")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    shown = config("show", "--config", "a.toml", "--standby", "2", "--json")
    assert shown.code == 0
    assert "hf_secret" not in shown.stdout
    rows = json.loads(shown.stdout)
    assert set(rows) == {*ServerConfig.model_fields, "hub_token"}
    found = {key: (row["value"], row["source"], row["name"]) for key, row in rows.items()}
    assert found["standby"] == (2, "flag", "--standby")
    assert found["port"] == (8, "variable", "LOADERD_PORT")
    assert found["keep_alive"] == (60, "file", "a.toml")
    assert found["listen"] == (["unix:/tmp/s"], "file", "a.toml")
    assert found["socket_mode"] == ("0660", "file", "a.toml")
    assert found["log_level"] == ("info", "default", "")
    assert found["cache_dir"] == (str(tmp_path / "home" / "hub"), "variable", "HF_HOME")
    assert found["hub_endpoint"] == ("https://hub.example", "variable", "HF_ENDPOINT")
    assert found["hub_token"] == ("********", "variable", "HF_TOKEN")


def test_what_it_shows_is_a_file_that_says_the_same(config: Config, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(FILE)
    shown = config("show", "--config", "a.toml", "--drain-timeout", "5").stdout
    assert "drain_timeout = 5.0  # --drain-timeout\n" in shown
    assert "# standby = 1  # default\n" in shown
    assert "# hub_token is not set\n" in shown
    named = {"port", "listen", "socket_mode", "keep_alive", "clients", "models", "drain_timeout"}
    assert set(tomllib.loads(shown)) == named | {"cache_dir"}  # HF_HOME names that
    (tmp_path / "b.toml").write_text(shown)
    given = {"config": "a.toml", "drain_timeout": "5"}
    assert load_config({"config": "b.toml"}).model_dump(exclude={"cache_dir"}) == load_config(
        given
    ).model_dump(exclude={"cache_dir"})


def test_a_command_is_needed(config: Config) -> None:
    done = config()
    assert done.code == 2
    assert "COMMAND" in done.stderr


def test_traces_need_an_extra(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config("check", "--tracing").code == 0
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.delitem(sys.modules, "loaderd.server.tracing.sdk", raising=False)
    problem = (
        "loaderd: --tracing needs packages that are not installed (opentelemetry.sdk): "
        "pip install 'loaderd[tracing]'\n"
    )
    assert config("check").code == 0
    done = config("check", "--tracing")
    assert (done.code, done.stderr) == (2, problem)


def test_where_traces_go_is_shown_with_where_that_is_from(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown() -> dict[str, str]:
        entry: dict[str, str] = json.loads(config("show", "--json").stdout)["tracing_endpoint"]
        return entry

    assert shown() == {"value": "http://localhost:4317", "source": "default", "name": ""}
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://box:4317")
    variable = {"source": "variable", "name": "OTEL_EXPORTER_OTLP_ENDPOINT"}
    assert shown() == {"value": "http://box:4317", **variable}
    # Secrets have no setting, so that none is shown.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=plugh")
    assert "plugh" not in config("show", "--tracing").stdout


@pytest.mark.parametrize(
    ("variable", "value"),
    [("OTEL_EXPORTER_OTLP_TIMEOUT", "long"), ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip")],
)
def test_variables_for_traces_that_cannot_be_used(
    config: Config, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert config("check").code == 0
    done = config("check", "--tracing")
    assert done.code == 2
    assert value in done.stderr
