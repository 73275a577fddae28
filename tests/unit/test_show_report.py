"""What the program says of a report that it verified: above all, whose word it is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rich.console import Console

from audit.report import build_report, sign_report, write_report
from console.show import show_report
from crypto.certificates import fingerprint
from protocol.errors import ReportInvalid
from tests.unit.audit_evidence import NOW, evidence


def said(report_file: Path, key_file: Path | None) -> str:
    output = io.StringIO()
    show_report(Console(file=output, width=120), report_file, key_file)
    return output.getvalue()


def test_whose_word_a_report_is_stands_beside_verified(tmp_path: Path) -> None:
    """A report whose signature somebody took off still follows from its own evidence."""
    key = Ed25519PrivateKey.generate()
    report = build_report(evidence(), NOW)
    unsigned = write_report(report, tmp_path / "unsigned")[0]
    signed = write_report(sign_report(report, key), tmp_path / "signed")[0]
    trusted = tmp_path / "release.pub"
    trusted.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert "not signed: whoever has the file can change its evidence" in said(unsigned, None)
    assert fingerprint(key.public_key())[:16] in said(signed, None)
    assert "give --key" in said(signed, None)
    assert "signed by the owner of the given key" in said(signed, trusted)
    with pytest.raises(ReportInvalid):
        said(unsigned, trusted)
