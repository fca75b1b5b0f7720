"""Property tests on a shared machine: an example may be slow for reasons of its own, so there is no deadline."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("shared", settings(), deadline=None)
settings.load_profile("shared")
