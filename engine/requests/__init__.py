"""Requests as the scheduler sees them: what was asked (`Request`, frozen) and where it stands (`Sequence`, the one
mutable record).
"""
