"""What all suites share."""

from __future__ import annotations

from hypothesis import settings

# On a busy machine with few cores a single slow example says nothing; a failing one must be repeatable from the log.
settings.register_profile("quire", deadline=None, print_blob=True)
settings.load_profile("quire")
