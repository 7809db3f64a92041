"""Pull tests: killed at any moment, and gone on with."""
