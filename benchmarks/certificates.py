"""Certificates for a run: one authority, one certificate for everybody, mutual TLS everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme

from benchmarks.devices import scratch_directory


@dataclass(frozen=True, slots=True)
class Certificates:
    """Where the files are. `qemu_directory` has the names that QEMU and libnbd look for."""

    cert: Path
    key: Path
    ca: Path
    qemu_directory: Path

    @classmethod
    def of(cls, directory: Path) -> Certificates:
        """Return those of a directory that `certificates` has made."""
        cert, key = directory / "server-cert.pem", directory / "server-key.pem"
        return cls(cert, key, directory / "ca-cert.pem", directory)

    @property
    def options(self) -> list[str]:
        """Return the words that `warmsync` takes them with."""
        files = (f"--tls-cert={self.cert}", f"--tls-key={self.key}", f"--tls-ca={self.ca}")
        return list(files)


@contextmanager
def certificates(*hosts: str) -> Iterator[Certificates]:
    """Certificates valid for these names and addresses, removed again."""
    authority = trustme.CA()
    issued = authority.issue_cert(*hosts)
    chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
    with scratch_directory() as directory:
        (directory / "ca-cert.pem").write_bytes(authority.cert_pem.bytes())
        for end in ("server", "client"):
            (directory / f"{end}-cert.pem").write_bytes(chain)
            (directory / f"{end}-key.pem").write_bytes(issued.private_key_pem.bytes())
        yield Certificates.of(directory)
