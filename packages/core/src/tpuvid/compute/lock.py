"""The lock of whatever only one thread may do at a time. Imports neither jax nor torch."""

import threading

TRACING = threading.RLock()
"""Held by whoever opens a stage, builds or traces a module, and taken before any other lock. Compiling, loading weights and
running programs need it not."""
