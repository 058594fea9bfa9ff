"""Lanes: where deferred events wait and are processed, one at a time and in order."""
