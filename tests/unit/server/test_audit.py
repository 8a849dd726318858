"""The audit log: who did what, and how it went."""

from __future__ import annotations

import json
import logging
import resource
import stat
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from loaderd.server.access.clients import ClientsFile
from loaderd.server.access.command import create_token
from loaderd.server.access.quotas import Quotas
from loaderd.server.config import ConfigError, load_config
from loaderd.server.daemon import Daemon
from loaderd.server.logs.audit import AuditLog
from loaderd.server.rpc.access import Access
from loaderd.server.systemd import Systemd
from loaderd.v1 import model_pb2
from tests.unit.server.box import open_box


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process grows past `size` meanwhile, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_are_added_to_a_file_of_this_user_only(tmp_path: Path) -> None:
    file = tmp_path / "audit.log"
    for action in ("one", "two"):
        with closing(AuditLog(file)) as audit:
            audit.write({"action": action})
    assert [line["action"] for line in lines(file)] == ["one", "two"]
    assert all(line["time"].endswith("Z") for line in lines(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_after_a_rotation_lines_go_to_the_new_file(tmp_path: Path) -> None:
    file, old = tmp_path / "audit.log", tmp_path / "audit.log.1"
    with closing(AuditLog(file)) as audit:
        audit.write({"action": "before"})
        file.rename(old)
        audit.write({"action": "after"})
        file.unlink()
        audit.write({"action": "again"})
    assert [line["action"] for line in lines(old)] == ["before"]
    assert [line["action"] for line in lines(file)] == ["again"]


def test_a_line_that_cannot_be_written_goes_to_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "audit.log"
    with closing(AuditLog(file)) as audit:
        audit.write({"action": "before"})
        with files_end_at(file.stat().st_size + 10):
            audit.write({"action": "lost", "request": {"model": "org/name"}})
        audit.write({"action": "after"})
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert '"action": "lost"' in record.message
    assert '"model": "org/name"' in record.message
    # What came of the lost line spoils no other one.
    first, torn, last = file.read_text().splitlines()
    assert json.loads(first)["action"] == "before"
    assert len(torn) == 10
    assert json.loads(last)["action"] == "after"


def test_so_does_one_whose_file_cannot_be_opened_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    with closing(AuditLog(folder / "audit.log")) as audit:
        (folder / "audit.log").rename(tmp_path / "old")
        folder.rmdir()
        audit.write({"action": "lost"})
        folder.mkdir()
        audit.write({"action": "after"})
    assert "No such file" in caplog.text
    assert '"action": "lost"' in caplog.text
    assert [line["action"] for line in lines(folder / "audit.log")] == ["after"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(OSError, match=r"directory|not a regular file"):
            AuditLog(path)


async def test_a_daemon_whose_audit_log_cannot_be_opened_does_not_start(tmp_path: Path) -> None:
    config = load_config(
        {
            "port": 0,
            "cache_dir": str(tmp_path / "cache"),
            "audit_log": str(tmp_path / "none" / "audit.log"),
        }
    )
    with pytest.raises(ConfigError, match=r"audit_log: .*audit\.log: No such file"):
        await Daemon(config, lambda: config, Systemd({})).run()


async def test_actions_have_a_line_each_and_looking_has_none(tmp_path: Path) -> None:
    file, clients = tmp_path / "audit.log", tmp_path / "clients.toml"
    tokens = {role: create_token(clients, f"some-{role}", role, None) for role in ("admin", "user")}
    known = ClientsFile(clients)
    with closing(AuditLog(file)) as audit:
        known.on_reload = audit.write
        access = Access(known, Quotas(time.monotonic))
        async with open_box(tmp_path, access=access, audit=audit) as box:

            def credentials(token: str) -> tuple[tuple[str, str], ...]:
                return (("authorization", f"Bearer {token}"), ("x-request-id", "mine"))

            model = str(box.folder)
            load = box.models.LoadModel(
                model_pb2.LoadModelRequest(
                    model=model, options=model_pb2.LoadOptions(device_map="cpu")
                ),
                metadata=credentials(tokens["user"]),
            )
            async for _ in load:
                pass
            unload = model_pb2.UnloadModelRequest(model=model)
            for token in (tokens["user"], "wrong", tokens["admin"]):
                call = box.models.UnloadModel(unload, metadata=credentials(token))
                assert await call.code() in {
                    grpc.StatusCode.OK,
                    grpc.StatusCode.PERMISSION_DENIED,
                    grpc.StatusCode.UNAUTHENTICATED,
                }
            clients.write_text("nonsense")
            await box.models.ListModels(
                model_pb2.ListModelsRequest(), metadata=credentials(tokens["admin"])
            )

    found = lines(file)
    keys = ("action", "client", "role", "code")
    assert [tuple(line.get(key) for key in keys) for line in found] == [
        ("LoadModel", "some-user", "user", "OK"),
        ("UnloadModel", "some-user", "user", "PERMISSION_DENIED"),
        ("UnloadModel", "", "", "UNAUTHENTICATED"),
        ("UnloadModel", "some-admin", "admin", "OK"),
        ("ReloadClients", "", None, "FAILED_PRECONDITION"),
    ]
    assert found[0]["request"] == {"model": model, "options": {"device_map": "cpu"}}
    assert found[0]["peer"].startswith("ipv4:127.0.0.1")
    assert {line["request_id"] for line in found[:-1]} == {"mine"}
    for token in (*tokens.values(), "wrong"):
        assert token not in file.read_text()
