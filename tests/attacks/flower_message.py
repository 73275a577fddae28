"""Flower's message class, imported although a library below Flower uses a name that click deprecates."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.app import Message as FlowerMessage

__all__ = ["FlowerMessage"]
