"""Certificates: there and back, refused whole, and what makes one hold."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from agent.certificate import (
    Certificate,
    dump,
    fingerprint,
    load,
    parse_key,
    signed_bytes,
    verify,
)
from agent.certificate.fields import MAX_CERTIFICATE_BYTES
from agent.certificate.statement import End, ProvenVolume, canonical, format_time
from agent.errors import InvalidArgument, WarmsyncError
from agent.migration import Depth, Role
from tests.agent.certificates import ROOT, certificate, sign, signer, statement

Values = dict[str, Any]


def values() -> Values:
    found: Values = json.loads(dump(certificate()))
    return found


def refused(data: bytes) -> str:
    """Return the field that was wrong; the message is a line, and never long."""
    with pytest.raises(InvalidArgument) as caught:
        load(data)
    assert caught.value.reason == "BAD_CUTOVER_CERTIFICATE"
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    return caught.value.values["field"]


@pytest.mark.parametrize("depth", Depth)
def test_there_and_back(depth: Depth) -> None:
    made = certificate(depth)
    assert load(dump(made)) == made
    verify(load(dump(made)), {})


def test_the_layout_of_the_file_does_not_matter() -> None:
    made = certificate()
    turned = dict(reversed(values().items()))
    assert load(json.dumps(turned).encode()) == made
    assert load(json.dumps(turned, indent=8, ensure_ascii=False).encode()) == made


def test_the_canonical_form_is_what_it_was() -> None:
    """The golden one: whoever changes it breaks all certificates that were ever given."""
    volume = (
        '{"algorithm":"xxh3-128-tree","chunk_bytes":65536,"compared_bytes":1073741824,'
        '"size_bytes":1073741824,"source_path":"/dev/vg/\\"ä","source_root":'
        '"000102030405060708090a0b0c0d0e0f","target_path":"/dev/vg/b","target_root":'
        '"000102030405060708090a0b0c0d0e0f"}'
    )
    golden = (
        '{"cutover_asked_at":"2023-11-14T22:13:20.250000Z","format_version":1,"generation":7,'
        '"migration":"web1","proved_at":"2023-11-14T22:13:21.500000Z","source":{"agent_version":'
        '"0.1.0","host":"one"},"target":{"agent_version":"0.2.0","host":"two"},"verify":"full",'
        f'"volumes":[{volume}]}}'
    )
    one = ProvenVolume('/dev/vg/"ä', "/dev/vg/b", 1 << 30, 1 << 30, ROOT, ROOT)
    made = statement(volumes=(one,))
    assert canonical(made).decode() == golden
    prefix = b"warmsync cutover certificate 1\0target\0"
    assert signed_bytes(made, Role.TARGET) == prefix + golden.encode()


def test_a_third_party_can_check_the_signatures() -> None:
    """With nothing of ours but the document."""
    read = values()
    text = json.dumps(
        read["statement"], ensure_ascii=False, sort_keys=True, separators=(",", ":")
    ).encode()
    for one in read["signatures"]:
        message = b"warmsync cutover certificate 1\0" + one["role"].encode() + b"\0" + text
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(one["public_key"]))
        key.verify(base64.b64decode(one["signature"]), message)


def _set(*path: str | int, to: object) -> Callable[[Values], None]:
    def spoil(read: Any) -> None:
        *way, last = path
        for step in way:
            read = read[step]
        read[last] = to

    return spoil


def _drop(*path: str | int) -> Callable[[Values], None]:
    def spoil(read: Any) -> None:
        *way, last = path
        for step in way:
            read = read[step]
        del read[last]

    return spoil


S, V = "statement", ("statement", "volumes", 0)
LONG = "a" * 5000
SPOILT: dict[str, tuple[Callable[[Values], None], str]] = {
    "no statement": (_drop(S), "certificate.statement"),
    "a list for a statement": (_set(S, to=[]), "statement"),
    "more": (_set("more", to=1), "certificate"),
    "more, steering the terminal": (_set("\x1b[2J\n\ud800", to=1), "certificate"),
    "more in the statement": (_set(S, "more", to=1), "statement"),
    "more in a volume": (_set(*V, "more", to=1), "statement.volumes[0]"),
    "more in an end": (_set(S, "source", "more", to=1), "statement.source"),
    "another version": (_set(S, "format_version", to=2), "statement.format_version"),
    "a version of another type": (_set(S, "format_version", to=True), "statement.format_version"),
    "no version": (_drop(S, "format_version"), "statement.format_version"),
    "no generation": (_drop(S, "generation"), "statement.generation"),
    "a generation below": (_set(S, "generation", to=-1), "statement.generation"),
    "a generation as text": (_set(S, "generation", to="7"), "statement.generation"),
    "a generation that is true": (_set(S, "generation", to=True), "statement.generation"),
    "a huge generation": (_set(S, "generation", to=1 << 63), "statement.generation"),
    "a broken generation": (_set(S, "generation", to=7.0), "file"),
    "an endless generation": (_set(S, "generation", to=float("inf")), "file"),
    "no number": (_set(S, "generation", to=float("nan")), "file"),
    "an id that is none": (_set(S, "migration", to="a/b"), "statement.migration"),
    "an id of a number": (_set(S, "migration", to=1), "statement.migration"),
    "a depth unknown": (_set(S, "verify", to="deep"), "statement.verify"),
    "a depth of a list": (_set(S, "verify", to=["full"]), "statement.verify"),
    "no volumes": (_set(S, "volumes", to=[]), "statement.volumes"),
    "many volumes": (_set(S, "volumes", to=[{}] * 1025), "statement.volumes"),
    "volumes by name": (_set(S, "volumes", to={}), "statement.volumes"),
    "an empty volume": (_set(*V, "size_bytes", to=0), "statement.volumes[0].size_bytes"),
    "a volume too large": (_set(*V, "size_bytes", to=1 << 63), "statement.volumes[0].size_bytes"),
    "other chunks": (_set(*V, "chunk_bytes", to=4096), "statement.volumes[0].chunk_bytes"),
    "another tree": (_set(*V, "algorithm", to="sha256"), "statement.volumes[0].algorithm"),
    "no root": (_set(*V, "source_root", to=None), "statement.volumes[0].source_root"),
    "a short root": (_set(*V, "target_root", to="00"), "statement.volumes[0].target_root"),
    "a root in capitals": (
        _set(*V, "target_root", to=ROOT.hex().upper()),
        "statement.volumes[0].target_root",
    ),
    "a root of other digits": (
        _set(*V, "target_root", to="\u0660" * 32),
        "statement.volumes[0].target_root",
    ),
    "roots where not all was compared": (
        _set(S, "verify", to="final"),
        "statement.volumes[0].source_root",
    ),
    "not all compared": (
        _set(*V, "compared_bytes", to=(1 << 30) - 1),
        "statement.volumes[0].compared_bytes",
    ),
    "no path": (_set(*V, "source_path", to=""), "statement.volumes[0].source_path"),
    "a long path": (_set(*V, "source_path", to=LONG), "statement.volumes[0].source_path"),
    "half a character": (_set(*V, "source_path", to="\ud800"), "statement.volumes[0].source_path"),
    "a long host": (_set(S, "source", "host", to="h" * 256), "statement.source.host"),
    "an end of a text": (_set(S, "target", to="two"), "statement.target"),
    "another form of time": (_set(S, "proved_at", to="2025-01-31"), "statement.proved_at"),
    "a time that never was": (
        _set(S, "proved_at", to="2025-02-31T00:00:00.000000Z"),
        "statement.proved_at",
    ),
    "a time elsewhere": (
        _set(S, "cutover_asked_at", to="2025-02-01T00:00:00.000000+01:00"),
        "statement.cutover_asked_at",
    ),
    "one signature": (_drop("signatures", 0), "signatures"),
    "three signatures": (lambda read: read["signatures"].append({}), "signatures"),
    "two of the source": (_set("signatures", 1, "role", to="source"), "signatures"),
    "another role": (_set("signatures", 1, "role", to="witness"), "signatures[1].role"),
    "a role of a list": (_set("signatures", 1, "role", to=[]), "signatures[1].role"),
    "a short key": (_set("signatures", 0, "public_key", to="AAAA"), "signatures[0].public_key"),
    "a key that is null": (
        _set("signatures", 0, "public_key", to=None),
        "signatures[0].public_key",
    ),
    "a short signature": (_set("signatures", 0, "signature", to="AAAA"), "signatures[0].signature"),
    "no base64": (_set("signatures", 0, "signature", to="é" * 88), "signatures[0].signature"),
    "spare bits": (
        _set("signatures", 0, "public_key", to="A" * 42 + "B="),
        "signatures[0].public_key",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_one_is_refused_by_name(name: str) -> None:
    spoil, field = SPOILT[name]
    read = values()
    spoil(read)
    assert refused(json.dumps(read).encode()) == field


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b'{"statement": 1, "statement": 2}',
        b"[" * 200_000,
        b'{"a":' * 150_000,
        b"1" * 10_000,
        b'{"statement": -' + b"1" * 10_000 + b', "signatures": []}',
        b'{"statement": 1e999, "signatures": []}',
        b" " * (MAX_CERTIFICATE_BYTES + 1),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_certificate_at_all(data: bytes) -> None:
    assert refused(data) in ("file", "certificate")


def test_a_field_twice_deep_inside_is_refused() -> None:
    text = dump(certificate()).replace(b'"host": "one"', b'"host": "one", "host": "one"')
    assert refused(text) == "file"


CHANGES: dict[str, Values] = {
    "generation": {"generation": 8},
    "migration": {"migration": "web2"},
    "asked": {"cutover_asked_at": format_time(0)},
    "proved": {"proved_at": format_time(0)},
    "source": {"source": End("one", "0.1.1")},
    "target": {"target": End("one", "0.2.0")},
    "roots": {
        "volumes": tuple(
            replace(one, source_root=ROOT[::-1], target_root=ROOT[::-1])
            for one in statement().volumes
        )
    },
    "size": {
        "volumes": tuple(
            replace(one, size_bytes=4096, compared_bytes=4096) for one in statement().volumes
        )
    },
    "order": {"volumes": statement().volumes[::-1]},
    "fewer": {"volumes": statement().volumes[:1]},
}


def fails(made: Certificate, keys: dict[Role, str] | None = None) -> WarmsyncError:
    with pytest.raises(WarmsyncError) as caught:
        verify(made, keys or {})
    return caught.value


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_can_be_changed_after_it_was_signed(name: str) -> None:
    changed = replace(certificate(), statement=statement(**CHANGES[name]))
    assert load(dump(changed)) == changed
    assert fails(changed).reason == "SIGNATURE_INVALID"


@pytest.mark.parametrize("role", Role)
def test_each_signature_is_checked(role: Role) -> None:
    made = certificate()
    other = sign(statement(generation=8))
    mixed = tuple(
        new if new.role is role else old
        for old, new in zip(made.signatures, other.signatures, strict=True)
    )
    error = fails(replace(made, signatures=mixed))
    assert (error.reason, error.values["role"]) == ("SIGNATURE_INVALID", role)


def test_one_agents_signature_is_not_the_others() -> None:
    made = certificate()
    swapped = tuple(
        replace(one, role=role)
        for one, role in zip(made.signatures, [Role.TARGET, Role.SOURCE], strict=True)
    )
    assert fails(replace(made, signatures=swapped)).reason == "SIGNATURE_INVALID"


def test_both_must_have_signed() -> None:
    made = certificate()
    for signatures in (made.signatures[:1], made.signatures[:1] * 2, ()):
        assert fails(replace(made, signatures=signatures)).reason == "BAD_CUTOVER_CERTIFICATE"


def test_the_order_of_the_signatures_does_not_matter() -> None:
    made = certificate()
    verify(replace(made, signatures=made.signatures[::-1]), {})


def test_unequal_roots_are_said_however_well_they_are_signed() -> None:
    volumes = statement().volumes
    differing = (volumes[0], replace(volumes[1], target_root=ROOT[::-1]))
    error = fails(sign(statement(volumes=differing)))
    assert error.reason == "ROOTS_DIFFER"
    assert error.values["source"] == "/srv/ä"


def test_expected_keys() -> None:
    prints = {role: signer(role).fingerprint for role in Role}
    verify(certificate(), prints)
    verify(certificate(), {Role.TARGET: prints[Role.TARGET]})
    for role in Role:
        wrong = {**prints, role: fingerprint(bytes(32))}
        error = fails(certificate(), wrong)
        assert (error.reason, error.values["role"]) == ("UNEXPECTED_KEY", role)


def test_keys_as_people_give_them() -> None:
    key = signer(Role.SOURCE).public_key
    assert parse_key(base64.b64encode(key).decode()) == fingerprint(key)
    assert parse_key(fingerprint(key)) == fingerprint(key)
    # As `ssh-keygen -l` would name these bytes: sha256sum, base64 without padding.
    assert fingerprint(b"") == "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU"


@pytest.mark.parametrize(
    "given", ["", "SHA256:", "SHA256:abc", "AAAA", "A" * 44, "A" * 42 + "B=", "é" * 44, "A" * 9999]
)
def test_what_is_no_key(given: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_key(given)
    assert caught.value.reason == "BAD_KEY"


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": -1},
        {"migration": ""},
        {"volumes": ()},
        {"proved_at": "now"},
        {"volumes": (ProvenVolume("/a", "/b", 1, 1, ROOT, None),)},
        {"volumes": (ProvenVolume("/a", "/b", 1, 1, ROOT, ROOT[:15]),)},
        {"volumes": (ProvenVolume("/a", "/b", 2, 1, ROOT, ROOT),)},
        {"volumes": [ProvenVolume("/a", "/b", 1, 1, ROOT, ROOT)]},
    ],
)
def test_nothing_is_signed_that_cannot_be_read_again(changes: Values) -> None:
    with pytest.raises(InvalidArgument) as caught:
        certificate(**changes)
    assert caught.value.reason == "BAD_CUTOVER_CERTIFICATE"


def test_times() -> None:
    assert format_time(0) == "1970-01-01T00:00:00.000000Z"
    assert format_time(1_700_000_000.25) == "2023-11-14T22:13:20.250000Z"
