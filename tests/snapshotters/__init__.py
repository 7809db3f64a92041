"""snapshotters tests."""
