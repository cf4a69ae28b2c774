"""A private certificate authority and what it signs, made by the `openssl` program, valid for a day."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple


class Certificate(NamedTuple):
    """A server's certificate, with the authority that signed it."""

    authority: Path
    certificate: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """A TLS context for the server."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


def sign(folder: Path, host: str) -> Certificate:
    """A new authority in a new folder, and a certificate for this host name."""
    folder.mkdir(mode=0o755)
    made = Certificate(folder / "authority.pem", folder / "server.pem", folder / "server.key")
    key = ["-newkey", "rsa:2048", "-nodes"]
    days = ["-days", "1"]
    _openssl("req", "-x509", *key, *days, "-keyout", folder / "authority.key", "-out", made.authority,
             "-subj", "/CN=A private authority", "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    _openssl("req", *key, "-keyout", made.key, "-out", folder / "request", "-subj", f"/CN={host}")
    names = folder / "names"
    names.write_text(f"subjectAltName=DNS:{host}\nauthorityKeyIdentifier=keyid\n", encoding="utf-8")
    _openssl("x509", "-req", *days, "-in", folder / "request", "-CA", made.authority,
             "-CAkey", folder / "authority.key", "-CAcreateserial",
             "-extfile", names, "-out", made.certificate)  # fmt: skip
    return made


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
