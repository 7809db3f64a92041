"""The tests: one folder per kind, shared pieces beside this file."""
