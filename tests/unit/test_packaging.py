"""The wheel as a user installs it: without extras it is the SDK and `loaderctl`."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.packaging


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command away from the source, and without a user's own site packages."""
    environment = os.environ | {"PYTHONNOUSERSITE": "1", "PYTHONPATH": "", "COLUMNS": "100"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def pip(*arguments: str | Path, folder: Path) -> None:
    done = run([sys.executable, "-m", "pip", *arguments], folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, folder=folder)
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder, with_pip=False, symlinks=True)
    constraints = ROOT / "constraints.txt"
    pip("--python", folder, "install", "--constraint", constraints, wheel, folder=folder)
    return folder / "bin"


def test_the_wheel_holds_the_three_portions_and_nothing_beside_them(wheel: Path) -> None:
    files = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    tops = {file.parts[0] for file in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"loaderd"}
    assert len(tops) == 2
    for package in ("v1", "server", "server/worker", "client", "cli"):
        assert any(file.parent == Path("loaderd", package) for file in files), package
    typed = {file.parent.name for file in files if file.name == "py.typed"}
    assert typed == {"v1", "server", "client", "cli"}
    # An __init__.py there would hide the other portions.
    assert Path("loaderd/__init__.py") not in files
    assert not [file for file in files if file.suffix == ".pyc"]


def test_the_base_install_is_complete_and_light(programs: Path, tmp_path: Path) -> None:
    pip("--python", programs.parent, "check", folder=tmp_path)
    program = (
        "from importlib.util import find_spec\n"
        "from loaderd.client import AsyncClient, Client\n"
        "heavy = ['torch', 'transformers', 'numpy', 'huggingface_hub', 'pydantic_settings']\n"
        "print([name for name in heavy if find_spec(name)])\n"
    )
    done = run([programs / "python", "-c", program], tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_loaderctl_works_in_the_base_install(programs: Path, tmp_path: Path) -> None:
    done = run([programs / "loaderctl", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Usage: loaderctl" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--port", "0"]])
def test_loaderd_names_the_missing_extra(
    programs: Path, tmp_path: Path, arguments: list[str]
) -> None:
    done = run([programs / "loaderd", *arguments], tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'loaderd[server]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_users_type_checker_knows_the_sdk(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "from loaderd.client import Client\n"
        "from loaderd.v1 import model_pb2\n"
        "reveal_type(Client('localhost:1'))\n"
        "reveal_type(model_pb2.LoadModelRequest(model='org/name').model)\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-incremental"]
    done = run([*mypy, "--python-executable", programs / "python", "user.py"], tmp_path)
    assert done.returncode == 0, done.stdout
    revealed = [line.rpartition("note: Revealed type is ")[2] for line in done.stdout.splitlines()]
    assert revealed[0].strip('"').endswith(".Client")
    assert revealed[1].strip('"') in {"str", "builtins.str"}
