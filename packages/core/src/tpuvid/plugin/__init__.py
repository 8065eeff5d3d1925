"""For who writes a plugin: a package to begin with, and a check of what it has become."""
