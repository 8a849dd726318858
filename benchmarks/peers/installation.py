"""The peers' own environments, below one folder, so that none of them touches the project's."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(".cache/peers").absolute()
_CONSTRAINTS = Path("constraints.txt").absolute()


class Installation:
    """A virtual environment with one peer in it.

    Args:
        name: Of the peer and of its folder.
        requirements: What pip installs.
        constraints: Whether to take the project's versions of what both need.
        unwanted: What is removed again of what they bring.
    """

    def __init__(
        self,
        name: str,
        requirements: Sequence[str],
        *,
        constraints: bool,
        unwanted: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.folder = FOLDER / name
        self._requirements = requirements
        self._constraints = ["-c", str(_CONSTRAINTS)] if constraints else []
        self._unwanted = unwanted
        self._complete = self.folder / ".complete"

    @property
    def is_complete(self) -> bool:
        """Whether it is installed."""
        return self._complete.exists()

    def program(self, name: str) -> str:
        """Path of one of its programs."""
        return str(self.folder / "bin" / name)

    def install(self) -> None:
        """Installs it, unless it is there.

        Raises:
            subprocess.CalledProcessError: pip or a compiler failed; it has printed why.
        """
        if self.is_complete:
            return
        subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
        self._install()
        self._complete.touch()

    def _install(self) -> None:
        self._pip("install", "--quiet", *self._constraints, *self._requirements)
        if self._unwanted:
            self._pip("uninstall", "--quiet", "--yes", *self._unwanted)

    def _pip(self, *arguments: str | Path) -> None:
        subprocess.run([self.program("python"), "-m", "pip", *arguments], check=True)


class LlamaCpp(Installation):
    """llama.cpp's server, built for this machine from the sources that llama-cpp-python carries.

    llama-cpp-python's own server answers one request at a time; llama.cpp's batches them.
    """

    _BUILD_TOOLS = ("cmake", "ninja")
    _CONVERTER = ("gguf", "sentencepiece", "torch", "transformers")
    _OPTIONS = (
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_APP=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_OPENSSL=OFF",
    )

    def __init__(self, name: str, release: str) -> None:
        super().__init__(name, [*self._BUILD_TOOLS, *self._CONVERTER], constraints=True)
        self._release = release
        self._source = self.folder / "source"
        self._build = self.folder / "build"

    @property
    def server(self) -> str:
        """Path of the server program."""
        return str(self._build / "bin" / "llama-server")

    def converted(self, model: Path) -> Path:
        """The model's weights as bfloat16 in a GGUF file; made when first asked for.

        Raises:
            subprocess.CalledProcessError: llama.cpp's converter does not take the model.
        """
        file = self.folder / f"{model.name}.gguf"
        if not file.exists():
            partial = file.with_suffix(".partial")
            converter = self._source / "convert_hf_to_gguf.py"
            options = ["--outtype", "bf16", "--outfile", str(partial)]
            command = [self.program("python"), str(converter), str(model), *options]
            subprocess.run(command, check=True, capture_output=True)
            partial.rename(file)
        return file

    def _install(self) -> None:
        super()._install()
        if not self._source.exists():
            self._fetch()
        cmake, ninja = self.program("cmake"), self.program("ninja")
        folders = ["-S", str(self._source), "-B", str(self._build)]
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run([cmake, *folders, *generator, *self._OPTIONS], check=True)
        subprocess.run([cmake, "--build", self._build, "--target", "llama-server"], check=True)

    def _fetch(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            only_source = ["--no-deps", "--no-binary", "llama-cpp-python"]
            self._pip("download", "--quiet", *only_source, "--dest", scratch, self._release)
            (archive,) = Path(scratch).glob("*.tar.gz")
            with tarfile.open(archive) as sources:
                sources.extractall(scratch, filter="data")
            (source,) = Path(scratch).glob("*/vendor/llama.cpp")
            source.rename(self._source)
