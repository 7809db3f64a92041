"""Stress tests: several processes at once on one store."""
