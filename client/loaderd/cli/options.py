"""Arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, TypeVar

import typer

from loaderd.cli.units import parse_keep_alive, parse_replicas

T = TypeVar("T")


class DtypeName(StrEnum):
    """What `--dtype` takes."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class QuantizationName(StrEnum):
    """What `--quantization` takes."""

    INT8 = "int8"
    INT4 = "int4"
    NF4 = "nf4"


class OffloadName(StrEnum):
    """What `--offload` takes."""

    CPU = "cpu"
    DISK = "disk"


def parser(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Makes a usage error, with its text, of a value that `parse` does not take."""

    def parse_option(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parse_option


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="org/name, name, either with @revision, or a local folder (starting with ., ~ or /).",
        show_default=False,
    ),
]
LoadedModel = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Name or id of a loaded model.", show_default=False),
]
KeepAlive = Annotated[
    timedelta | None,
    typer.Option(
        parser=parser(parse_keep_alive),
        metavar="SPAN",
        help="How long it stays loaded while nobody uses it, such as 30s, 10m or 2h; 0: until its "
        'first use has ended; "always": until it is unloaded. Default: the daemon\'s setting.',
        show_default=False,
    ),
]
DeviceMap = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WHERE",
        help='"auto", "balanced", "sequential", "cpu", or one accelerator such as "cuda:0"; or '
        'MODULE=DEVICE, again for each module, where DEVICE may be "disk" too.',
        show_default=False,
    ),
]
MaxMemory = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICE=SIZE",
        help="Most memory of a device, such as cuda:0=10GiB; again for more devices.",
        show_default=False,
    ),
]
Offload = Annotated[
    OffloadName | None,
    typer.Option(
        help="Where layers may go that do not fit: main memory, or the disk after that. "
        "Default: nowhere.",
        show_default=False,
    ),
]
Replicas = Annotated[
    int | None,
    typer.Option(
        parser=parser(parse_replicas),
        metavar="N",
        help="How many processes serve it, under one name. Default: as many as there are; 1 if it "
        "is not loaded.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")]
