"""What is on disk: files of our own, written whole, and strangers', read with care. Imports neither jax nor torch."""
