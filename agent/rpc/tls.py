"""TLS credentials for both ends, from files.

Owns reading certificates and saying what is wrong with them before gRPC sees them: gRPC itself
only tells that a handshake failed. Both ends always show a certificate and check the other's.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from agent.config import TlsConfig
from agent.errors import InvalidArgument


def server_credentials(files: TlsConfig) -> grpc.ServerCredentials:
    """Return credentials that also demand a certificate of the client. InvalidArgument."""
    cert, key, ca = _load(files)
    return grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)


def channel_credentials(files: TlsConfig) -> grpc.ChannelCredentials:
    """Return the client's credentials. InvalidArgument BAD_CERTIFICATE."""
    cert, key, ca = _load(files)
    return grpc.ssl_channel_credentials(ca, key, cert)


def check_files(files: TlsConfig) -> None:
    """Raise InvalidArgument BAD_CERTIFICATE, naming the file, if these cannot work."""
    _load(files)


def _load(files: TlsConfig) -> tuple[bytes, bytes, bytes]:
    cert, key, ca = _read(files.cert), _read(files.key), _read(files.ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _try_authority(context, files.ca)
    _try_certificate(files.cert)
    try:
        # Without a password of our own OpenSSL would ask for one on the terminal.
        context.load_cert_chain(files.cert, files.key, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise _bad_key(files, error) from error
    return cert, key, ca


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _bad(
            path, f"cannot be read ({error.strerror}): give the path of a PEM file"
        ) from error


def _try_authority(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise _bad(path, "holds no certificate: give the authority's, in PEM") from error


def _try_certificate(path: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise _bad(path, "holds no certificate: give this agent's, in PEM") from error


def _bad_key(files: TlsConfig, error: Exception) -> InvalidArgument:
    if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
        return _bad(files.key, f"is not the key of {files.cert}: give the pair made together")
    return _bad(files.key, "holds no private key without a password: give one, in PEM")


def _bad(path: str, what: str) -> InvalidArgument:
    return InvalidArgument("BAD_CERTIFICATE", f"{path} {what}", file=path)
