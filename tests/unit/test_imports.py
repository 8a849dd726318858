"""The direction of imports, read from the source.

`client -> v1 <- server`, and inside the server `cli -> daemon -> rpc -> models -> {store,
supervisor}`; the worker is a program of its own. What is heavy stays in the worker.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PORTIONS = ("protos", "server", "client")

# Needed everywhere in the server.
_BASE = {
    "loaderd.server.errors",
    "loaderd.server.single_flight",
    "loaderd.server.store.names",
    "loaderd.server.tracing",
    "loaderd.v1",
}
_LOWER = {"loaderd.server.store", "loaderd.server.supervisor", "loaderd.server.config"}

# What each part may import of our own besides itself. A part is a module, or a package with
# everything in it; the most precise one counts.
MAY_IMPORT: dict[str, set[str]] = {
    "loaderd.v1": set(),
    "loaderd.worker.v1": {"loaderd.v1"},
    "loaderd.client": {"loaderd.v1"},
    "loaderd.cli": {"loaderd.client"},
    "loaderd.server": set(),
    "loaderd.server.errors": {"loaderd.v1"},
    "loaderd.server.box": {"loaderd.server.errors", "loaderd.v1"},
    "loaderd.server.logs": {"loaderd.server.tracing"},
    "loaderd.server.tracing": {"loaderd.server.errors", "loaderd.v1"},
    "loaderd.server.parent": set(),
    "loaderd.server.single_flight": {"loaderd.server.tracing"},
    "loaderd.server.addresses": set(),
    "loaderd.server.access": {"loaderd.server.errors"},
    "loaderd.server.setting_types": {
        "loaderd.server.addresses",
        "loaderd.server.errors",
        "loaderd.server.store.names",
    },
    "loaderd.server.setting_sources": set(),
    "loaderd.server.config": {
        "loaderd.server.addresses",
        "loaderd.server.setting_sources",
        "loaderd.server.setting_types",
    },
    "loaderd.server.store.names": {"loaderd.server.errors"},
    "loaderd.server.store": _BASE
    | {"loaderd.server.config", "loaderd.server.logs", "loaderd.server.parent"},
    "loaderd.server.supervisor": _BASE
    | {"loaderd.worker.v1", "loaderd.server.config", "loaderd.server.logs"},
    "loaderd.server.models": _BASE
    | _LOWER
    | {"loaderd.worker.v1", "loaderd.server.access", "loaderd.server.box"},
    "loaderd.server.rpc": _BASE
    | _LOWER
    | {
        "loaderd.worker.v1",
        "loaderd.server.access",
        "loaderd.server.addresses",
        "loaderd.server.logs",
        "loaderd.server.models",
    },
    "loaderd.server.http": _BASE
    | _LOWER
    | {
        "loaderd.server.addresses",
        "loaderd.server.logs",
        "loaderd.server.models",
        "loaderd.server.rpc",
    },
    "loaderd.server.systemd": set(),
    "loaderd.server.from_config": _BASE
    | _LOWER
    | {
        "loaderd.server.access",
        "loaderd.server.logs",
        "loaderd.server.models",
        "loaderd.server.rpc",
    },
    "loaderd.server.reload": {
        "loaderd.server.config",
        "loaderd.server.from_config",
        "loaderd.server.logs",
        "loaderd.server.models",
        "loaderd.server.rpc",
        "loaderd.server.store",
        "loaderd.server.systemd",
    },
    "loaderd.server.daemon": _BASE
    | _LOWER
    | {
        "loaderd.server.access",
        "loaderd.server.from_config",
        "loaderd.server.http",
        "loaderd.server.logs",
        "loaderd.server.models",
        "loaderd.server.reload",
        "loaderd.server.rpc",
        "loaderd.server.systemd",
    },
    "loaderd.server.config_command": {
        "loaderd.server.config",
        "loaderd.server.from_config",
        "loaderd.server.setting_sources",
        "loaderd.server.store",
        "loaderd.server.supervisor",
    },
    "loaderd.server.cli": {
        "loaderd.server.access",
        "loaderd.server.config",
        "loaderd.server.config_command",
        "loaderd.server.daemon",
        "loaderd.server.systemd",
        "loaderd.server.logs",
    },
    "loaderd.server.worker": {
        "loaderd.v1",
        "loaderd.worker.v1",
        "loaderd.server.box",
        "loaderd.server.errors",
        "loaderd.server.logs",
        "loaderd.server.parent",
        "loaderd.server.store",
        "loaderd.server.store.names",
    },
}

HEAVY = {"torch", "transformers", "accelerate"}
GRPC = {"grpc", "grpc_health", "grpc_reflection", "grpc_status"}
# Where they may be imported: below these.
HEAVY_PARTS = ("loaderd.server.worker",)
OPENTELEMETRY_PARTS = ("loaderd.server.tracing.sdk", "loaderd.client.tracing")
GRPC_PARTS = (
    "loaderd.v1",
    "loaderd.worker.v1",
    "loaderd.client",
    "loaderd.server.rpc",
    "loaderd.server.supervisor",
    "loaderd.server.daemon",
    "loaderd.server.worker",
)
PURE = ("loaderd.server.models.lifecycle", "loaderd.server.models.placement")
NOT_PURE = GRPC | HEAVY | {"asyncio"}

# Besides the standard library.
THIRD_PARTY = {
    "loaderd.client": {"google", "grpc", "grpc_health", "grpc_status", "opentelemetry"},
    "loaderd.cli": {"rich", "typer"},
}


class Source:
    """The modules below some folders, and what they import.

    Attributes:
        imports: By module, everything it imports, also inside functions and for types only.
    """

    def __init__(self, *portions: Path) -> None:
        files = {
            _module(folder, file): file for folder in portions for file in folder.rglob("*.py")
        }
        self.imports = {
            name: set(_imports(name, file, files.keys())) for name, file in files.items()
        }

    def below(self, *parts: str) -> set[str]:
        return {name for name in self.imports if any(_in(name, part) for part in parts)}

    def wrong_directions(self) -> list[str]:
        """Imports that `MAY_IMPORT` does not allow, and modules that it does not know."""
        return sorted(
            f"{name} imports {target}"
            for name, targets in self.imports.items()
            for target in targets
            if _in(target, "loaderd") and not _allowed(name, target)
        )

    def importers(self, targets: set[str], *, outside: tuple[str, ...]) -> list[str]:
        """Who imports one of the top-level packages without being below one of the parts."""
        return sorted(
            f"{name} imports {target}"
            for name in self.imports.keys() - self.below(*outside)
            for target in self.imports[name]
            if target.partition(".")[0] in targets
        )

    def reached(self, module: str) -> set[str]:
        """What comes with a module: its imports, and those of what it imports of ours."""
        seen, todo = set[str](), [module]
        while todo:
            new = self.imports.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen


def _allowed(name: str, target: str) -> bool:
    part = _part(name)
    return part is not None and (_part(target) in {part} | MAY_IMPORT[part])


def _part(module: str) -> str | None:
    """The part that a module belongs to; below a package only if that is a part itself."""
    while module and module not in MAY_IMPORT:
        module = module.rpartition(".")[0]
    return module or None


def _in(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def _module(portion: Path, file: Path) -> str:
    parts = file.relative_to(portion).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, file: Path, known: Container[str]) -> Iterator[str]:
    """What a file imports; `from a import b` is `a.b` where that is a module of ours."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in known else base


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(*(ROOT / portion for portion in PORTIONS))


@pytest.mark.parametrize(
    "part",
    sorted({*MAY_IMPORT, *HEAVY_PARTS, *OPENTELEMETRY_PARTS, *GRPC_PARTS, *PURE, *THIRD_PARTY}),
)
def test_every_part_that_a_rule_names_is_there(source: Source, part: str) -> None:
    assert source.below(part)


def test_every_portion_is_read() -> None:
    assert {folder.parent.name for folder in ROOT.glob("*/loaderd")} == set(PORTIONS)


def test_every_module_of_the_server_belongs_to_a_part_of_its_own(source: Source) -> None:
    stray = {name for name in source.imports if _part(name) in {None, "loaderd.server"}}
    assert stray == {"loaderd.server"}


def test_imports_go_in_the_right_direction(source: Source) -> None:
    assert source.wrong_directions() == []


def test_heavy_packages_stay_in_the_worker(source: Source) -> None:
    assert source.importers(HEAVY, outside=HEAVY_PARTS) == []


def test_opentelemetry_stays_behind_two_doors(source: Source) -> None:
    assert source.importers({"opentelemetry"}, outside=OPENTELEMETRY_PARTS) == []


def test_grpc_stays_at_the_edges(source: Source) -> None:
    assert source.importers(GRPC, outside=GRPC_PARTS) == []
    stubs = [
        f"{name} imports {target}"
        for name in source.imports.keys() - source.below(*GRPC_PARTS)
        for target in source.imports[name]
        if target.endswith("_pb2_grpc")
    ]
    assert stubs == []


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_bring_nothing_with_them(source: Source, module: str) -> None:
    brought = {target.partition(".")[0] for target in source.reached(module)}
    assert not brought & NOT_PURE


@pytest.mark.parametrize("part", THIRD_PARTY)
def test_the_client_side_needs_little(source: Source, part: str) -> None:
    targets = {t.partition(".")[0] for name in source.below(part) for t in source.imports[name]}
    assert targets - sys.stdlib_module_names - {"loaderd"} <= THIRD_PARTY[part]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("loaderd.server.daemon", {"torch", "transformers", "accelerate", "loaderd.server.worker"}),
        # An extra: only --http brings it.
        ("loaderd.server.daemon", {"starlette", "uvicorn", "prometheus_client"}),
        # Another one, which only --tracing brings, and only into the daemon.
        ("loaderd.server.daemon", {"opentelemetry"}),
        ("loaderd.client", {"opentelemetry"}),
        ("loaderd.server.http.service", {"torch", "transformers", "accelerate"}),
        ("loaderd.client", {"torch", "transformers", "typer", "rich", "loaderd.server"}),
        ("loaderd.cli.main", {"torch", "transformers", "loaderd.server"}),
    ],
)
def test_what_an_import_brings_into_a_process(module: str, absent: set[str]) -> None:
    program = f"import {module}, sys; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.splitlines())
    assert module in modules
    assert not modules & absent


@pytest.mark.parametrize(
    ("file", "code", "finding"),
    [
        (
            "client/loaderd/client/x.py",
            "def f():\n    import loaderd.server.errors",
            "loaderd.client.x imports loaderd.server.errors",
        ),
        (
            "server/loaderd/server/store/x.py",
            "from ..models import registry",
            "loaderd.server.store.x imports loaderd.server.models",
        ),
        (
            "server/loaderd/server/store/__init__.py",
            "from . import y\nfrom .. import supervisor",
            "loaderd.server.store imports loaderd.server.supervisor",
        ),
        (
            "server/loaderd/server/rpc/x.py",
            "from loaderd.server.worker import loader",
            "loaderd.server.rpc.x imports loaderd.server.worker",
        ),
    ],
)
def test_a_wrong_direction_is_found(tmp_path: Path, file: str, code: str, finding: str) -> None:
    for package in ("models", "supervisor", "worker"):
        _write(tmp_path / f"server/loaderd/server/{package}/__init__.py", "")
    _write(tmp_path / "server/loaderd/server/store/y.py", "")
    _write(tmp_path / file, code)
    assert Source(tmp_path / "server", tmp_path / "client").wrong_directions() == [finding]


def test_a_heavy_import_is_found_directly_and_through_others(tmp_path: Path) -> None:
    _write(tmp_path / "loaderd/server/models/a.py", "from loaderd.server.models import b")
    _write(tmp_path / "loaderd/server/models/b.py", "from torch.nn import functional")
    source = Source(tmp_path)
    assert source.importers(HEAVY, outside=HEAVY_PARTS) == [
        "loaderd.server.models.b imports torch.nn"
    ]
    assert "torch.nn" in source.reached("loaderd.server.models.a")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
