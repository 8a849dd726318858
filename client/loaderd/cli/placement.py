"""The options that say where layers go, as people write them."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from loaderd.cli.units import parse_size


def device_map(words: Sequence[str]) -> str | dict[str, str] | None:
    """What `--device-map` means: one place for all, or `MODULE=DEVICE` any number of times.

    Raises:
        typer.BadParameter: It is both, or several places.
    """
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    modules: dict[str, str] = {}
    for word in words:
        module, given, device = word.rpartition("=")
        if not given:
            raise typer.BadParameter(
                f"{word!r} beside another one; give one place, or MODULE=DEVICE for each module",
                param_hint="--device-map",
            )
        if module in modules:
            raise typer.BadParameter(f"{module!r} is given twice", param_hint="--device-map")
        modules[module] = device
    return modules or None


def max_memory(words: Sequence[str]) -> dict[str, int] | None:
    """What `--max-memory` means: `DEVICE=SIZE` any number of times.

    Raises:
        typer.BadParameter: One is something else.
    """
    bounds: dict[str, int] = {}
    for word in words:
        device, given, size = word.partition("=")
        if not given or device in bounds:
            problem = "is given twice" if given else "is no DEVICE=SIZE, such as cuda:0=10GiB"
            raise typer.BadParameter(
                f"{device if given else word!r} {problem}", param_hint="--max-memory"
            )
        try:
            bounds[device] = parse_size(size)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--max-memory") from None
    return bounds or None
