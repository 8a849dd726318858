"""Compiles C for the CPU that this process runs on, and keeps what came of it."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from loaderd.server.box.dtype import cpu_flags

logger = logging.getLogger(__name__)

_COMPILERS = ("cc", "gcc", "clang")
_OPTIONS = (
    "-std=c11",
    "-O3",
    "-march=native",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
_MOST_SECONDS = 120.0
_MOST_KEPT = 8


class NotCompiledError(Exception):
    """There is no such library here; the text says why, to operators."""


def load(source: Path, folder: Path | None) -> ctypes.CDLL:
    """Makes a file a part of this process; its functions are called without Python's lock.

    Args:
        source: Of C.
        folder: Where libraries are kept, which nobody else may write to; None to keep none.

    Returns:
        The library, from a file whose name is another for each source, compiler and CPU.

    Raises:
        NotCompiledError: There is no compiler, it or the loader failed, or the folder is not fit.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="kernels-") as scratch:
            return load(source, Path(scratch))
    compiler = _compiler()
    try:
        folder = Path(os.path.realpath(folder))
        _own(folder)
        library = folder / f"{_identity(source, compiler)}.so"
        if not library.exists():
            _compile(compiler, source, library)
            _forget_old(folder)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NotCompiledError(str(error)) from error


def _compiler() -> str:
    """Where the operator's or the system's is.

    Raises:
        NotCompiledError: There is none.
    """
    asked = os.environ.get("CC")
    for name in (asked,) if asked else _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise NotCompiledError(f"CC is no program: {asked}" if asked else "there is no C compiler")


def _identity(source: Path, compiler: str) -> str:
    program = Path(compiler).resolve()
    changed = program.stat().st_mtime_ns  # by an update, or on another box with the same home
    digest = hashlib.sha256(source.read_bytes())
    facts = [str(program), str(changed), *_OPTIONS, *sorted(cpu_flags())]
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()


def _own(folder: Path) -> None:
    """Makes the folder.

    Raises:
        NotCompiledError: Others may write to it, and so into this process.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotCompiledError(f"others may write to {folder}")
    for above in folder.parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # and so put another in its place
            raise NotCompiledError(f"others may write to {above}")


def _compile(compiler: str, source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch, "library.so")
        command = [compiler, *_OPTIONS, "-o", str(made), str(source), "-lm"]
        try:
            done = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_MOST_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise NotCompiledError(f"{compiler} took more than {_MOST_SECONDS:g} s") from error
        if done.returncode:
            logger.warning("%s failed: %s", compiler, done.stderr.strip())
            raise NotCompiledError(f"{compiler} failed")
        with made.open("rb") as file:
            os.fsync(file.fileno())  # else a crash of the box could leave a part of it
        made.replace(library)


def _forget_old(folder: Path) -> None:
    """Libraries of other versions and CPUs, but for the last ones."""
    try:
        libraries = sorted(folder.glob("*.so"), key=lambda library: library.stat().st_mtime)
        for library in libraries[:-_MOST_KEPT]:
            library.unlink(missing_ok=True)
    except FileNotFoundError:
        logger.info("another process removes libraries from %s", folder)
