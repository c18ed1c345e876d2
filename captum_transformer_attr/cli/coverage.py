"""The ``coverage`` command."""

from __future__ import annotations
