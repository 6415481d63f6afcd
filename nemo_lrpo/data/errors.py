"""Errors of the data room."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be trained on. The message names file, row, field and what is accepted."""
