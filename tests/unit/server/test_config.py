import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from loaderd.server.addresses import TcpAddress, UnixAddress
from loaderd.server.config import ConfigError, ServerConfig, load_config
from loaderd.server.reload import LIVE


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("LOADERD_", "HF_", "HUGGING", "OTEL_")):
            monkeypatch.delenv(name)


def test_defaults_are_safe() -> None:
    config = load_config({})
    assert config.addresses == (TcpAddress("127.0.0.1", 50051),)
    assert config.allow_local == (Path.cwd(),)
    assert not config.insecure


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "loaderd.toml"
    file.write_text("port = 1\ndrain_timeout = 1\nstandby = 0\n")
    monkeypatch.setenv("LOADERD_PORT", "2")
    monkeypatch.setenv("LOADERD_DRAIN_TIMEOUT", "2")
    config = load_config({"config": str(file), "port": "3"})
    assert (config.port, config.drain_timeout, config.standby) == (3, 2, 0)
    monkeypatch.setenv("LOADERD_CONFIG", str(file))
    assert load_config({}).standby == 0


def test_several_local_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    monkeypatch.setenv("LOADERD_ALLOW_LOCAL", f"{first}:{second}")
    assert load_config({}).allow_local == (first, second)
    assert load_config({"allow_local": [str(second)]}).allow_local == (second,)


def test_models_whose_pickles_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config({}).allow_pickle == ()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.setenv("LOADERD_ALLOW_PICKLE", f"org/name:{tmp_path}/link")
    assert load_config({}).allow_pickle == ("org/name", str(tmp_path / "model"))
    assert load_config({"allow_pickle": ["gpt2"]}).allow_pickle == ("gpt2",)
    file = tmp_path / "loaderd.toml"
    file.write_text('allow_pickle = ["org/a", "org/b"]\n')
    monkeypatch.delenv("LOADERD_ALLOW_PICKLE")
    assert load_config({"config": str(file)}).allow_pickle == ("org/a", "org/b")


def test_a_socket_replaces_tcp_unless_a_port_is_asked_for(tmp_path: Path) -> None:
    socket = UnixAddress(tmp_path / "s")
    assert load_config({"socket": str(socket.path)}).addresses == (socket,)
    both = load_config({"socket": str(socket.path), "port": "0"}).addresses
    assert both == (TcpAddress("127.0.0.1", 0), socket)


def test_several_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket = UnixAddress(tmp_path / "s")
    monkeypatch.setenv("LOADERD_LISTEN", f"[::1]:1,{socket}")
    assert load_config({}).addresses == (TcpAddress("::1", 1), socket)
    assert load_config({"port": "2"}).addresses == (
        TcpAddress("127.0.0.1", 2),
        TcpAddress("::1", 1),
        socket,
    )
    file = tmp_path / "loaderd.toml"
    file.write_text('listen = ["localhost:3"]\nsocket = "/tmp/t"\nsocket_mode = 0o660\n')
    monkeypatch.delenv("LOADERD_LISTEN")
    monkeypatch.setenv("LOADERD_SOCKET_GROUP", "0")
    config = load_config({"config": str(file)})
    assert config.addresses == (UnixAddress(Path("/tmp/t")), TcpAddress("localhost", 3))
    assert (config.socket_mode, config.socket_group) == (0o660, "0")
    monkeypatch.setenv("LOADERD_SOCKET_MODE", "0666")
    assert load_config({"config": str(file)}).socket_mode == 0o666


EXPOSED: list[dict[str, object]] = [
    {"host": "0.0.0.0"},
    {"listen": ["127.0.0.1:0", "[::]:1"]},
    {"listen": ["gpu-box:1"]},
]
TLS = {"tls_cert": "/etc/cert.pem", "tls_key": "/etc/key.pem"}
KNOWN = [{"clients": "/etc/clients.toml"}, {"tls_client_ca": "/etc/ca.pem"}]


@pytest.mark.parametrize("address", EXPOSED)
def test_an_address_that_others_reach_needs_tls_and_clients_or_that_it_is_said(
    address: dict[str, object],
) -> None:
    flags: Mapping[str, object]
    for flags in ({}, TLS, KNOWN[0]):
        with pytest.raises(ConfigError, match=r"--tls-cert.*--clients.*--insecure"):
            load_config({**address, **flags})
    for flags in ({**TLS, **KNOWN[0]}, {**TLS, **KNOWN[1]}, {"insecure": True}):
        assert load_config({**address, **flags}).addresses


def test_what_guards_an_address_that_others_reach_is_not_taken_from_it_while_it_runs() -> None:
    running = load_config({**EXPOSED[0], **TLS, **KNOWN[0]})
    changed = load_config({"keep_alive": "7"})
    assert running.changed_in(changed, ["keep_alive"]).keep_alive == 7
    assert running.changed_in(changed, ["keep_alive"]).clients == running.clients
    with pytest.raises(ConfigError, match=r"0.0.0.0:50051 can be reached from other machines"):
        running.changed_in(changed, ["keep_alive", "clients"])


def test_patterns_of_models(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "models")
    config = load_config(
        {
            "allow_model": ["org/*", "gpt2"],
            "deny_model": ["org/bad-?", f"{tmp_path}/link"],
            "max_model_bytes": "20GB",
        }
    )
    assert config.allow_model == ("org/*", "gpt2")
    assert config.deny_model == ("org/bad-?", str(tmp_path / "models"))
    assert config.max_model_bytes == 20_000_000_000


def test_http_is_off_and_stays_on_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config({}).http is None
    monkeypatch.setenv("LOADERD_HTTP", "127.0.0.1:8080")
    assert load_config({}).http == TcpAddress("127.0.0.1", 8080)
    assert load_config({"http": "[::1]:0"}).http == TcpAddress("::1", 0)
    exposed = TcpAddress("0.0.0.0", 1)
    assert load_config({"http": str(exposed), "insecure": True}).http == exposed
    assert load_config({"http": str(exposed), **TLS, **KNOWN[0]}).http == exposed


def test_http_needs_clients_with_tokens_where_others_have_certificates() -> None:
    for flags in ({}, {"http": "127.0.0.1:0"}, {"http": "0.0.0.0:1"}):
        given = {**TLS, **KNOWN[1], **flags}
        if flags:
            with pytest.raises(ConfigError, match=r"http.*tokens.*--clients"):
                load_config(given)
        assert load_config({**given, **KNOWN[0]}).tls_client_ca


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"port": "70000"}, "port"),
        ({"port": "x"}, "port"),
        ({"standby": "-1"}, "standby"),
        ({"drain_timeout": "-1"}, "drain_timeout"),
        ({"drain_timeout": "nan"}, "drain_timeout"),
        ({"load_timeout": "inf"}, "load_timeout"),
        ({"hub_attempts": "0"}, "hub_attempts"),
        ({"hub_attempts": "21"}, "hub_attempts"),
        ({"hub_longest_wait": "-1"}, "hub_longest_wait"),
        ({"log_level": "loud"}, "log_level"),
        ({"allow_local": ["/no/such/folder"]}, "allow_local"),
        ({"allow_pickle": ["../model"]}, "allow_pickle.*absolute"),
        ({"allow_pickle": ["a/b/c"]}, "allow_pickle.*'a/b/c'"),
        ({"allow_pickle": ["org/name@v1"]}, "allow_pickle.*allow the repository, org/name"),
        ({"host": "0.0.0.0"}, "--insecure"),
        ({"http": "0.0.0.0:8080"}, "0.0.0.0.*--insecure"),
        ({"http": "gpu-box:8080"}, "gpu-box.*--insecure"),
        ({"http": "0.0.0.0:1", "clients": "/etc/clients.toml"}, "--tls-cert.*--insecure"),
        ({"http": "/run/socket"}, "http.*'/run/socket' is no address"),
        ({"http": "8080"}, "http.*'8080' is no address"),
        ({"http": "nope"}, r"http: 'nope' is no address: use host:port or \[ipv6\]:port"),
        ({"http": "127.0.0.1:65536"}, "http.*65536"),
        ({"hub_endpoint": "http://example.com"}, "https"),
        ({"hub_endpoint": "ftp://example.com"}, "https"),
        ({"config": "/no/such/file"}, "config"),
        ({"bogus": "1"}, "bogus"),
        ({"keep_alive": "1e9"}, "keep_alive"),
        ({"load_on_demand": "yes"}, "load_on_demand"),
        ({"preload": ["a/b/c"]}, "preload.*'a/b/c'"),
        ({"listen": ["localhost"]}, "listen.*'localhost' is no address"),
        ({"listen": ["unix:here"]}, "listen.*'unix:here' is no address"),
        ({"listen": ["127.0.0.1:65536"]}, "listen.*65536"),
        ({"listen": ["127.0.0.1:0"], "host": "::1"}, "host goes with port"),
        ({"socket": "/tmp/s", "socket_mode": "rw"}, "socket_mode.*0660"),
        ({"socket": "/tmp/s", "socket_mode": "01777"}, "socket_mode"),
        ({"socket": "/tmp/s", "socket_group": "no such group"}, "socket_group.*no such group"),
        ({"socket": "/tmp/s", "socket_role": "anonymous"}, "socket_role"),
        ({"socket": "/tmp/s", "listen": ["unix:/tmp/s"]}, "unix:/tmp/s is given twice"),
        ({"port": "7", "listen": ["127.0.0.1:7"]}, "127.0.0.1:7 is given twice"),
        ({"socket_mode": "0660"}, "socket_mode is about unix sockets"),
        ({"tls_cert": "a"}, "tls_key"),
        ({"tls_client_ca": "a"}, "tls_cert"),
        ({"allow_model": ["/models"]}, "allow_model.*--allow-local"),
        ({"deny_model": ["a b"]}, "deny_model.*'a b'"),
        ({"max_model_bytes": "0"}, "max_model_bytes"),
        ({"max_model_bytes": "foo"}, "max_model_bytes: 'foo' is no size; write one as 20GB"),
        ({"cache_max_bytes": "5 parsecs"}, "cache_max_bytes: '5 parsecs' is no size; write one"),
    ],
)
def test_a_bad_setting_is_named(flags: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(flags)


def test_an_unknown_setting_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "loaderd.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ConfigError, match="prot"):
        load_config({"config": str(file)})
    file.write_text("port = ")
    with pytest.raises(ConfigError, match="config"):
        load_config({"config": str(file)})


def test_models_that_are_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "loaderd.toml"
    file.write_text(
        '[[models]]\nname = "org/name@v1"\ndtype = "float32"\nkeep_alive = 60\n'
        'quantization = "int8"\nreplicas = 2\n'
        '[[models]]\nname = "./model"\nmax_memory = { cpu = "2GiB" }\noffload = "disk"\n'
        '[[models]]\nname = "org/c"\ndevice_map = { "" = "cpu", "model.layers" = "disk" }\n'
    )
    monkeypatch.chdir(tmp_path)
    config = load_config({"config": str(file), "preload": ["org/other", "~/x"]})
    first, second, third = config.models
    assert (first.name, first.dtype, first.keep_alive) == ("org/name@v1", "float32", 60)
    assert (first.quantization, first.replicas) == ("int8", 2)
    assert (second.name, second.device_map) == (str(tmp_path / "model"), "auto")
    assert second.keep_alive < 0
    assert (second.max_memory, second.offload) == ({"cpu": 2 << 30}, "disk")
    assert third.device_map == {"": "cpu", "model.layers": "disk"}
    assert config.preload == ("org/other", str(Path("~/x").expanduser()))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ('name = "a/b/c"', "models.0.name.*'a/b/c'"),
        ('name = "a/b"\ndtype = "int3"', "models.0.dtype"),
        ('name = "a/b"\nquantization = "int3"', "models.0.quantization"),
        ('name = "a/b"\noffload = "tape"', "models.0.offload"),
        ('name = "a/b"\nmax_memory = { cpu = "much" }', "models.0.max_memory"),
        ('name = "a/b"\ncolour = "red"', "models.0.colour"),
        ("keep_alive = 3", "models.0.name"),
    ],
)
def test_a_bad_model_of_the_file_is_named(tmp_path: Path, table: str, says: str) -> None:
    file = tmp_path / "loaderd.toml"
    file.write_text(f"[[models]]\n{table}\n")
    with pytest.raises(ConfigError, match=says):
        load_config({"config": str(file)})


def test_the_token_comes_from_the_file_the_variable_or_the_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert load_config({}).hub_token() is None
    (tmp_path / "token").write_text("from-login\n")
    assert load_config({}).hub_token() == "from-login"
    monkeypatch.setenv("HF_TOKEN", "from-variable")
    assert load_config({}).hub_token() == "from-variable"
    file = tmp_path / "mine"
    file.write_text("from-file\n")
    assert load_config({"hub_token_file": str(file)}).hub_token() == "from-file"
    with pytest.raises(ConfigError, match="hub_token_file"):
        load_config({"hub_token_file": str(tmp_path / "none")}).hub_token()
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"hub_token_file: .* it is not text"):
        load_config({"hub_token_file": str(file)}).hub_token()


def test_help_explains_every_setting() -> None:
    command = [sys.executable, "-m", "loaderd.server.cli", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    for name, field in ServerConfig.model_fields.items():
        assert name == "models" or "--" + name.replace("_", "-") in text
        assert field.description


def test_the_docs_say_which_settings_change_while_the_daemon_runs() -> None:
    docs = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    section = docs.partition("## Settings read again\n")[2].partition("\n## ")[0]
    named = re.findall("`([a-z_]+)`", section)
    assert sorted(named) == sorted(LIVE)
    assert set(LIVE) <= set(ServerConfig.model_fields)


def test_traces_are_asked_for_by_an_option_or_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not load_config({}).tracing
    assert load_config({"tracing": True}).tracing
    file = tmp_path / "loaderd.toml"
    file.write_text('[tracing]\nendpoint = "http://box:4317"\nratio = 0.5\nservice_name = "mine"\n')
    config = load_config({"config": str(file)})
    assert config.tracing
    assert config.tracing_endpoint == "http://box:4317"
    assert (config.tracing_ratio, config.tracing_service_name) == (0.5, "mine")
    monkeypatch.setenv("LOADERD_TRACING_RATIO", "0.25")
    assert load_config({"config": str(file)}).tracing_ratio == 0.25
    assert not load_config({"config": str(file), "tracing": False}).tracing
    file.write_text("[tracing]\nenabled = false\nratio = 0.5\n")
    assert not load_config({"config": str(file)}).tracing


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("tracing_ratio = 0.5", "tracing_ratio is about traces, and there are none; add --tracing"),
        ("[tracing]\nratio = 2", "tracing_ratio: .* less than or equal to 1"),
        ("[tracing]\nendpoit = 1", "tracing_endpoit: .*perhaps tracing_endpoint is meant"),
        ("[tracing]\nheaders = 'a=b'", "tracing_headers: there is no such setting"),
        ("[tracing]\nenabled = 'perhaps'", "tracing: "),
        ("tracing_ratio = 1\n[tracing]\nratio = 0.5", "ratio .* twice"),
        *(
            (f"[tracing]\nendpoint = {endpoint!r}", "tracing_endpoint: must ")
            for endpoint in (
                "box:4317",
                "grpc://box:4317",
                "http://box",
                "http://box:x",
                "http://box:4318/v1/traces",
                "http://me:plugh@box:4317",
            )
        ),
    ],
)
def test_bad_settings_of_traces_are_refused(tmp_path: Path, table: str, problem: str) -> None:
    file = tmp_path / "loaderd.toml"
    file.write_text(table)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config({"config": str(file)})
    assert "plugh" not in str(caught.value)
