"""Flower, imported although a library below it uses a name that click deprecates.

Modules of the tests import this one before any other that leads to Flower.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import flwr.app
    import flwr.serverapp

__all__ = ["FLOWER_VERSION", "flwr"]

FLOWER_VERSION = version("flwr")
