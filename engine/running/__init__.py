"""Containers: what a runtime is told, who watches over it, and what becomes of it."""
