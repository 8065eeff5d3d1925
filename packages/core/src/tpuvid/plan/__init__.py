"""What a TPU will do, found out without one: libtpu compiles the real programs on any machine."""
