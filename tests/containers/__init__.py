"""Containers launched and destroyed, many at a time, by engines that are killed at random."""
