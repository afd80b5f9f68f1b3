"""The interface keeps its conventions: read from the descriptors and the sources."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor
from warmsync.v1 import (
    host_service_pb2,
    migration_pb2,
    migration_service_pb2,
    peer_service_pb2,
)

FILES: list[FileDescriptor] = [
    module.DESCRIPTOR
    for module in (host_service_pb2, migration_pb2, migration_service_pb2, peer_service_pb2)
]
SOURCES = sorted((Path(__file__).parents[2] / "protos/warmsync/v1").glob("*.proto"))
WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])")


def messages() -> Iterator[Descriptor]:
    for file in FILES:
        yield from file.message_types_by_name.values()


def enums() -> Iterator[EnumDescriptor]:
    for file in FILES:
        yield from file.enum_types_by_name.values()


def fields() -> Iterator[FieldDescriptor]:
    for message in messages():
        yield from message.fields


def named(item: Descriptor | EnumDescriptor | FieldDescriptor) -> str:
    return str(item.full_name)


@pytest.mark.parametrize("enum", list(enums()), ids=named)
def test_enums(enum: EnumDescriptor) -> None:
    prefix = WORDS.sub("_", enum.name).upper() + "_"
    assert enum.values_by_number[0].name == f"{prefix}UNSPECIFIED"
    assert [v.name for v in enum.values if not v.name.startswith(prefix)] == []
    assert sorted(enum.values_by_number) == list(range(len(enum.values)))


def test_sizes_and_times_say_what_they_are() -> None:
    wrong = [
        named(field)
        for field in fields()
        if (
            (field.name.endswith("_bytes") and field.name != "logical_block_size_bytes")
            and field.type != FieldDescriptor.TYPE_INT64
        )
        or (field.name.endswith("_seconds") and field.type != FieldDescriptor.TYPE_DOUBLE)
        or (
            (field.name.endswith("_per_second"))
            and field.type not in (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_DOUBLE)
        )
    ]
    assert wrong == []


def test_no_unsigned_numbers_and_no_floats() -> None:
    signed = {
        FieldDescriptor.TYPE_INT32,
        FieldDescriptor.TYPE_INT64,
        FieldDescriptor.TYPE_DOUBLE,
        FieldDescriptor.TYPE_BOOL,
        FieldDescriptor.TYPE_STRING,
        FieldDescriptor.TYPE_BYTES,
        FieldDescriptor.TYPE_ENUM,
        FieldDescriptor.TYPE_MESSAGE,
    }
    assert [named(field) for field in fields() if field.type not in signed] == []


def test_names_are_snake_case() -> None:
    assert [
        named(field) for field in fields() if not re.fullmatch(r"[a-z]+(_[a-z]+)*", field.name)
    ] == []


def test_methods_take_and_give_messages_of_their_name() -> None:
    """Buf's rule, but for the standard methods, which give the resource or nothing (AIP)."""
    for file in FILES:
        for service in file.services_by_name.values():
            assert service.name.endswith("Service")
            for method in service.methods:
                assert method.input_type.name == f"{method.name}Request"
                allowed = {f"{method.name}Response", "Migration", "Empty"}
                assert method.output_type.name in allowed, method.full_name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_comments(path: Path) -> None:
    """Every service has one; every message too, but requests and answers, whose method has."""
    lines = path.read_text().splitlines()
    bare = []
    for before, line in zip(["", *lines], lines, strict=False):
        match = re.match(r"(service|message) (\w+)", line)
        if not match or re.search(r"(Request|Response)$", match[2]):
            continue
        if not before.startswith("//"):
            bare.append(match[2])
    assert bare == []


def test_every_source_is_looked_at() -> None:
    assert {path.name for path in SOURCES} == {Path(file.name).name for file in FILES}
