"""Certificates for tests, made with the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_DAYS = ("-days", "2")

HERE = "DNS:localhost,IP:127.0.0.1"
"""What a server's certificate is for."""


class Certificate:
    """A certificate and its private key, as PEM files of a folder.

    Attributes:
        certificate: The certificate.
        key: Its key.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.certificate = folder / f"{name}.pem"
        self.key = folder / f"{name}.key"

    def install(self, folder: Path, name: str) -> Certificate:
        """Copies it to where it replaces what has that name."""
        copy = Certificate(folder, name)
        shutil.copy(self.key, copy.key)
        shutil.copy(self.certificate, copy.certificate)
        return copy


class Authority(Certificate):
    """Signs certificates."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        self._folder = folder
        _openssl(
            *("req", "-x509", *_KEY, *_DAYS, "-subj", f"/CN={name}"),
            *("-keyout", str(self.key), "-out", str(self.certificate)),
        )

    def sign(self, name: str, alternatives: str | None) -> Certificate:
        """A new certificate, with alternative names or a common name alone."""
        signed = Certificate(self._folder, name)
        request, extensions = self._folder / f"{name}.csr", self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternatives}\n" if alternatives else "")
        _openssl(
            *("req", *_KEY, "-subj", f"/CN={name}"),
            *("-keyout", str(signed.key), "-out", str(request)),
        )
        _openssl(
            *("x509", "-req", "-in", str(request), *_DAYS, "-CAcreateserial"),
            *("-CA", str(self.certificate), "-CAkey", str(self.key)),
            *("-extfile", str(extensions), "-out", str(signed.certificate)),
        )
        return signed


def encrypt(key: Path, copy: Path) -> None:
    """Writes a copy of a private key that needs a password."""
    _openssl("ec", "-in", str(key), "-aes128", "-passout", "pass:secret", "-out", str(copy))


def _openssl(*arguments: str) -> None:
    done = subprocess.run(
        ["openssl", *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
