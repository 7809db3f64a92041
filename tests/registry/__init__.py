"""registry tests."""
