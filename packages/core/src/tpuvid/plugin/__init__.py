"""Plugins: loading them, and what helps to write one."""
