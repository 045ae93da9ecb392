"""HTTPS: whether certificate and key belong together and hold, and how those who know the certificate verify it.

Serve's Python proxy ends TLS. HAProxy cannot: Ray's template binds plain HTTP.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from modelyard.errors import DataError
from modelyard.recipe.schema import Options

_MEND = "give PEM files that the server's user can read: the certificate with its chain, and its unencrypted key"


class Tls(Options):
    """Certificate and key of the server, on every node that has a proxy."""

    certificate: str = Field(description="PEM file: the server's certificate, then those of its issuers")
    key: str = Field(description="PEM file: its private key, without a password")

    def absolute(self) -> tuple[str, str]:
        """Paths of certificate and key that mean the same in every process of this machine."""
        return str(Path(self.certificate).absolute()), str(Path(self.key).absolute())


def check(tls: Tls) -> None:
    """Ends a TLS session with these files in this process, as a client would meet them.

    Raises DataError when a file is missing or unreadable, the key belongs to another certificate or has a password,
    or the certificate is not valid today.
    """
    for path in (tls.certificate, tls.key):
        _read(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=_no_password)
    except ssl.SSLError as error:
        raise _refusal(tls, error) from error
    try:
        _shake_hands(context, client_context(tls.certificate))
    except ssl.SSLCertVerificationError as error:
        raise DataError(
            f"the certificate would be refused: {error.verify_message}",
            place=tls.certificate,
            mend="have it issued anew, for servers and for today; or set this machine's clock",
        ) from error


def client_context(authorities: str, *, hostname: bool = False) -> ssl.SSLContext:
    """What a client trusts: the certificates of one PEM file alone, issuers or the server's own.

    Args:
        authorities: PEM file.
        hostname: whether the certificate has to name the host that is asked.

    Raises DataError when the file holds no certificate.
    """
    _read(authorities)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = hostname
    # Otherwise a certificate that is not its own issuer would not do as the one that is trusted.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cafile=authorities)
    except ssl.SSLError as error:
        raise DataError("the file holds no certificate", place=authorities, mend=_MEND) from error
    return context


def _refusal(tls: Tls, error: ssl.SSLError) -> DataError:
    """The error in words. OpenSSL does not say which of the two files it means, except for the pair."""
    if error.reason == "KEY_VALUES_MISMATCH":
        both = f"{tls.certificate}, {tls.key}"
        return DataError("key and certificate do not belong together", place=both, mend=_MEND)
    client_context(tls.certificate)
    return DataError("the file holds no private key without a password", place=tls.key, mend=_MEND)


def _read(path: str) -> None:
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", place=path, mend=_MEND) from error


def _no_password() -> str:
    """In place of OpenSSL's question at the terminal."""
    return ""


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """A whole handshake through memory. Raises ssl.SSLError as either side would."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)]
    for _ in range(4):  # TLS 1.3 takes two flights, 1.2 four
        for side in sides:
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
