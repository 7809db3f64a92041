"""Checks a whole store against itself and its layers, and repairs what it can from what is there."""
