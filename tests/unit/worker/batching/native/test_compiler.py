"""Where kernels are compiled and kept, and what is told where they are not to be had."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from loaderd.server.worker.engine.batching.native import compiler, kernels
from loaderd.server.worker.engine.batching.native.compiler import NotCompiledError, load

SOURCE = "int answer(void) { return 42; }"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    try:
        compiler._compiler()
    except NotCompiledError as error:
        pytest.skip(str(error))
    source = tmp_path / "answer.c"
    source.write_text(SOURCE)
    return source


def compiler_that(does: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return path


def test_a_library_is_compiled_once(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "caches" / "kernels"
    assert load(source, folder).answer() == 42
    (library,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    made = library.stat().st_mtime_ns
    assert load(source, folder).answer() == 42
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == [made]


def test_another_source_is_another_library(source: Path, tmp_path: Path) -> None:
    load(source, tmp_path / "kernels")
    source.write_text(SOURCE.replace("42", "43"))
    assert load(source, tmp_path / "kernels").answer() == 43


def test_without_a_folder_nothing_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert load(source, None).answer() == 42
    assert list(tmp_path.iterdir()) == [source]


def test_the_last_ones_are_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_MOST_KEPT", 2)
    for number in range(4):
        source.write_text(SOURCE.replace("42", str(number)))
        load(source, tmp_path / "kernels")
        newest = max((tmp_path / "kernels").iterdir(), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (number, number))
    assert sorted(path.stat().st_mtime for path in (tmp_path / "kernels").iterdir()) == [2, 3]


def test_a_folder_that_others_write_to_is_refused(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(NotCompiledError, match="others may write to"):
        load(source, folder)


def test_a_folder_that_others_can_exchange_is_refused(source: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (tmp_path / "mine").symlink_to(shared)
    for caches in (shared, tmp_path / "mine"):
        with pytest.raises(NotCompiledError, match=f"others may write to {shared}$"):
            load(source, caches / "kernels")
    shared.chmod(0o1777)  # as /tmp: what is mine stays where it is
    assert load(source, shared / "kernels").answer() == 42


def test_a_folder_that_cannot_be_made(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotCompiledError, match="file"):
        load(source, tmp_path / "file" / "kernels")


def test_a_program_with_errors(source: Path, tmp_path: Path) -> None:
    source.write_text("int answer(void) { return")
    with pytest.raises(NotCompiledError, match="failed"):
        load(source, tmp_path / "kernels")
    assert list((tmp_path / "kernels").iterdir()) == []


def test_no_compiler(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotCompiledError, match="there is no C compiler"):
        load(source, tmp_path / "kernels")


def test_the_operators_compiler_goes_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_that("echo mine >&2; exit 3", tmp_path / "mine", monkeypatch)
    with pytest.raises(NotCompiledError, match="mine failed"):
        load(source, tmp_path / "kernels")


def test_another_compiler_than_the_operators_is_not_taken(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(NotCompiledError, match="CC is no program: no-such-compiler"):
        load(source, tmp_path / "kernels")


def test_an_updated_compiler_compiles_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compiler_that(f'exec {compiler._compiler()} "$@"', tmp_path / "cc", monkeypatch)
    load(source, tmp_path / "kernels")
    os.utime(found, (1, 1))
    load(source, tmp_path / "kernels")
    assert len(list((tmp_path / "kernels").iterdir())) == 2


def test_a_compiler_that_does_not_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_that("exec sleep 60", tmp_path / "cc", monkeypatch)
    monkeypatch.setattr(compiler, "_MOST_SECONDS", 0.1)
    with pytest.raises(NotCompiledError, match=r"cc took more than 0\.1 s"):
        load(source, tmp_path / "kernels")
    assert list((tmp_path / "kernels").iterdir()) == []


@pytest.mark.parametrize("made", ["", "no library"])
def test_what_is_no_library_is_told(
    made: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'while [ "$1" != -o ]; do shift; done; printf "{made}" > "$2"'
    compiler_that(script, tmp_path / "cc", monkeypatch)
    with pytest.raises(NotCompiledError, match=r"\.so"):
        load(source, tmp_path / "kernels")


def test_without_gnu_openmp_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _name: object())
    with pytest.raises(NotCompiledError, match="OpenMP"):
        kernels.Kernels(None)
