"""Where settings come from: the command line, the environment, the TOML file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

PREFIX = "LOADERD_"

# Variables of libraries that stand in for a setting.
_STANDARD_VARIABLES = {
    "cache_dir": ("HF_HUB_CACHE", "HF_HOME"),
    "hub_endpoint": ("HF_ENDPOINT",),
    "offline": ("HF_HUB_OFFLINE",),
    "tracing_endpoint": ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    "tracing_ratio": ("OTEL_TRACES_SAMPLER",),
    "tracing_service_name": ("OTEL_SERVICE_NAME",),
}


@dataclass(frozen=True)
class Origin:
    """What sets a setting.

    Attributes:
        source: The kind of place.
        name: The flag, the variable or the file; empty for a default.
    """

    source: Literal["flag", "variable", "file", "default"]
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.source


class Sources:
    """The three places, read now.

    Args:
        flags: The settings given on the command line by name; `config` names the TOML file.

    Attributes:
        flags: The settings of the command line.
        file: The TOML file; None for none.
        table: The settings of the file; empty where it cannot be read.
        problem: Why it cannot be; empty where it can.
    """

    def __init__(self, flags: Mapping[str, object]) -> None:
        self.flags: dict[str, Any] = dict(flags)
        file: str | None = self.flags.pop("config", None) or os.environ.get(f"{PREFIX}CONFIG")
        self.file = None if file is None else Path(file)
        self.table: dict[str, Any] = {}
        self.problem = ""
        if self.file is None:
            return
        try:
            self.table = _by_option(tomllib.loads(self.file.read_text()))
        except FileNotFoundError:
            self.problem = f"config: there is no file {file}"
        except OSError as error:
            self.problem = f"config: cannot read {file}: {error.strerror}"
        except UnicodeDecodeError:
            self.problem = f"config: {file} is not text in UTF-8"
        except tomllib.TOMLDecodeError as error:
            self.problem = f"config: {file} is not TOML: {error}"
        except ValueError as error:
            self.problem = f"config: {file}: {error}"

    def origin(self, setting: str) -> Origin:
        """What sets a setting: the first of flag, variable, file and default that has it."""
        if setting in self.flags:
            return Origin("flag", "--" + setting.replace("_", "-"))
        for variable in os.environ:
            if variable.lower() == f"{PREFIX}{setting}".lower():
                return Origin("variable", variable)
        if setting in self.table:
            return Origin("file", str(self.file))
        for variable in _STANDARD_VARIABLES.get(setting, ()):
            if os.environ.get(variable):
                return Origin("variable", variable)
        return Origin("default")


def _by_option(table: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file by the names of their options, also those of its table [tracing].

    Raises:
        ValueError: It has one twice.
    """
    inner = table.get("tracing")
    if not isinstance(inner, dict):
        return table
    settings = {f"tracing_{name}": value for name, value in inner.items() if name != "enabled"}
    if twice := sorted(settings.keys() & table.keys()):
        raise ValueError(f"{twice[0]} stands in it twice, once in [tracing]")
    return {**table, "tracing": inner.get("enabled", True), **settings}
