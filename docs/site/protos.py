"""The page of the gRPC services, made from the .proto files and their comments by mkdocs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[2] / "protos"
_PAGE = "reference/grpc.md"
_Path = tuple[int, ...]

_MESSAGES = FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER
_ENUMS = FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER
_SERVICES = FileDescriptorProto.SERVICE_FIELD_NUMBER
_METHODS = ServiceDescriptorProto.METHOD_FIELD_NUMBER
_FIELDS = DescriptorProto.FIELD_FIELD_NUMBER
_VALUES = EnumDescriptorProto.VALUE_FIELD_NUMBER


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the page; called by mkdocs."""
    files.append(File.generated(config, _PAGE, content="\n".join(_page(_described()))))
    return files


def _described() -> Sequence[FileDescriptorProto]:
    """The public files, with their comments."""
    sources = sorted(str(path) for path in (_ROOT / "loaderd" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "descriptors")
        subprocess.run(
            [
                *(sys.executable, "-m", "grpc_tools.protoc", "-I", str(_ROOT)),
                *("--include_source_info", f"--descriptor_set_out={target}", *sources),
            ],
            check=True,
        )
        return FileDescriptorSet.FromString(target.read_bytes()).file


def _page(files: Sequence[FileDescriptorProto]) -> Iterator[str]:
    yield "# gRPC\n"
    yield "Package `loaderd.v1`. Reflection and `grpc.health.v1` are there too.\n"
    for file in files:
        comments = _comments(file)
        for index, service in enumerate(file.service):
            yield from _service(service, comments, (_SERVICES, index))
    for file in files:
        comments = _comments(file)
        for index, message in enumerate(file.message_type):
            yield from _message(message, comments, (_MESSAGES, index))
        for index, enum in enumerate(file.enum_type):
            yield from _enum(enum, comments, (_ENUMS, index))


def _service(
    service: ServiceDescriptorProto, comments: Mapping[_Path, str], path: _Path
) -> Iterator[str]:
    yield f"## {service.name}\n\n{comments.get(path, '')}\n"
    for index, method in enumerate(service.method):
        answer = "stream of " * method.server_streaming + _link(method.output_type)
        question = "stream of " * method.client_streaming + _link(method.input_type)
        yield f"### {service.name}.{method.name}\n\n{question} → {answer}\n"
        yield comments.get((*path, _METHODS, index), "") + "\n"


def _message(message: DescriptorProto, comments: Mapping[_Path, str], path: _Path) -> Iterator[str]:
    yield f"## {message.name}\n\n{comments.get(path, '')}\n"
    maps = {each.name: each for each in message.nested_type if each.options.map_entry}
    rows = [
        (f"`{field.name}`", _type(field, message, maps), comments.get((*path, _FIELDS, index), ""))
        for index, field in enumerate(message.field)
    ]
    yield from _table(("field", "type", "meaning"), rows)


def _enum(enum: EnumDescriptorProto, comments: Mapping[_Path, str], path: _Path) -> Iterator[str]:
    yield f"## {enum.name}\n\n{comments.get(path, '')}\n"
    rows = [
        (f"`{value.name}`", str(value.number), comments.get((*path, _VALUES, index), ""))
        for index, value in enumerate(enum.value)
    ]
    yield from _table(("value", "number", "meaning"), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if not rows:
        return
    for row in (heads, ["---"] * len(heads), *rows):
        yield "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in row) + " |"
    yield ""


def _type(
    field: FieldDescriptorProto, message: DescriptorProto, maps: Mapping[str, DescriptorProto]
) -> str:
    entry = maps.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = (_plain(part) for part in entry.field)
        return f"map of {key} to {value}"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {_plain(field)}"
    if field.proto3_optional:
        return f"optional {_plain(field)}"
    if field.HasField("oneof_index"):
        return f"{_plain(field)}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return _plain(field)


def _plain(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return _link(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _link(type_name: str) -> str:
    """To its heading, if it has one here."""
    package, _, name = type_name.removeprefix(".").rpartition(".")
    return f"[{name}](#{name.lower()})" if package == "loaderd.v1" else f"`{package}.{name}`"


def _comments(file: FileDescriptorProto) -> Mapping[_Path, str]:
    return {
        tuple(location.path): location.leading_comments.strip()
        for location in file.source_code_info.location
        if location.leading_comments
    }
