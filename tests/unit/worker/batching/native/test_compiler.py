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
    mine = tmp_path / "mine"
    mine.write_text("#!/bin/sh\necho mine >&2; exit 3\n")
    mine.chmod(0o755)
    monkeypatch.setenv("CC", str(mine))
    with pytest.raises(NotCompiledError, match="mine failed"):
        load(source, tmp_path / "kernels")


def test_without_gnu_openmp_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _name: object())
    with pytest.raises(NotCompiledError, match="OpenMP"):
        kernels.Kernels(None)
