"""compat tests."""
