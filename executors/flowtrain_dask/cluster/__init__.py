"""Lanes in other processes: what travels there and back, and what is done when a worker is lost."""
