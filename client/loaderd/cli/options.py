"""Arguments and options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class DtypeName(StrEnum):
    """What `--dtype` takes."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


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
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
