"""Snapshots: exact copies of what deferred handlers declare to read, and the view that shows them."""
