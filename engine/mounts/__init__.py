"""Mounts and their records: the kernel's table, who is in a mount, what commands make of both."""
