"""The bill of materials: every distribution that is installed here, with its licence."""

from __future__ import annotations

import importlib.metadata
import platform
from importlib.metadata import PackageMetadata

from audit.evidence.run import EnvironmentEvidence, Package

LONGEST_LICENCE = 80
"""A longer entry is the text of a licence and not its name."""

_CLASSIFIER = "License :: "


def environment() -> EnvironmentEvidence:
    """Return the versions of Python, of the platform and of everything installed for this Python."""
    return EnvironmentEvidence(
        python=platform.python_version(), platform=platform.platform(), packages=installed()
    )


def installed() -> list[Package]:
    """Return every installed distribution once, in order of its name, with the version that is imported."""
    found: dict[str, Package] = {}
    for item in importlib.metadata.distributions():
        name = item.name
        if name:
            found.setdefault(
                name.lower(), Package(name=name, version=item.version, licence=licence(item.metadata))
            )
    return [found[name] for name in sorted(found)]


def licence(metadata: PackageMetadata) -> str | None:
    """Return the licence that a distribution names, or None.

    An SPDX expression (PEP 639) goes before the older free field, and that before the classifiers.
    """
    named: list[str] = [(metadata.get_all(field) or [""])[0] for field in ("License-Expression", "License")]
    for text in named:
        if text and text.strip() and len(text) <= LONGEST_LICENCE and "\n" not in text.strip():
            return text.strip()
    listed: list[str] = metadata.get_all("Classifier") or []
    short = [entry.rpartition(" :: ")[2] for entry in listed if entry.startswith(_CLASSIFIER)]
    return ", ".join(short)[:LONGEST_LICENCE] or None
