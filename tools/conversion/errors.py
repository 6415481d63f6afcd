"""What both converters refuse with."""

from __future__ import annotations


class ConversionError(ValueError):
    """A model that cannot be converted; the message names the file and what is accepted."""
