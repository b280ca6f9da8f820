"""The certificate with which the server proves to its clients who it is.

The files are read with the settings and kept with them, so that all of this server and the next one have the same, also
when a file is broken in the meantime.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

MAX_PEM_BYTES = 1 << 20

# Forward secrecy and authenticated encryption; TLS 1.3 has no others (RFC 9325, 4.2).
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


@dataclass(frozen=True)
class Pem:
    """What the two files hold."""

    cert: bytes = field(repr=False)
    key: bytes = field(repr=False)


def read(cert: Path, key: Path) -> Pem:
    """Return what the files hold. Raises ValueError, naming the file that cannot be used and saying why."""
    pem = Pem(_read(cert, b"CERTIFICATE"), _read(key, b"PRIVATE KEY"))
    try:
        tls_context(pem)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{key} does not match {cert}: it is another certificate's key") from None
        raise ValueError(f"{cert} with {key} cannot be used: {_why(error)}") from None
    except _Encrypted:
        raise ValueError(f"{key} is encrypted, and nobody is there to be asked for its password") from None
    return pem


def tls_context(pem: Pem) -> ssl.SSLContext:
    """Return what a server needs: TLS 1.2 or later, HTTP/1.1 alone. Raises SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    with _as_file(pem.cert) as cert, _as_file(pem.key) as key:
        context.load_cert_chain(cert, key, password=_refuse_password)
    return context


def expiry_warning(cert: Path, pem: Pem) -> str | None:
    """Return what to say of a certificate that is not valid today, None of one that is."""
    try:
        with _as_file(pem.cert) as file:
            found = ssl._ssl._test_decode_cert(file)  # type: ignore[attr-defined]  # what getpeercert() uses
        begins, ends = (ssl.cert_time_to_seconds(found[name]) for name in ("notBefore", "notAfter"))
    except (AttributeError, OSError, KeyError, ValueError):  # a Python without it: the clients will tell
        return None
    if time.time() > ends:
        return f"{cert} has expired, {found['notAfter']}: clients refuse it"
    if time.time() < begins:
        return f"{cert} is not valid before {found['notBefore']}: clients refuse it"
    return None


class _Encrypted(Exception):
    pass


def _refuse_password() -> bytes:
    raise _Encrypted


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Give a name under which OpenSSL, which reads files only, finds the content; it never lies on a disk."""
    fd = os.memfd_create("harnessd-pem", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _read(path: Path, holds: bytes) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a FIFO would be waited for
            raise ValueError(f"{path} is no file")
        with open(path, "rb") as file:
            content = file.read(MAX_PEM_BYTES)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {(error.strerror or 'error').lower()}") from None
    if holds + b"-----" not in content:
        raise ValueError(f"{path} holds no {holds.decode().lower()} in PEM form")
    return content


def _why(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()
