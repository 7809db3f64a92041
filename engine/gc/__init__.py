"""Garbage collection: what is reachable stays, everything else goes."""
