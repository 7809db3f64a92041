"""fault tests."""
