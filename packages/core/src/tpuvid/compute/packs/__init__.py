"""Packs: the compiled programs of all stages in one file."""
