"""Provisioning: root file systems of containers, on real mounts."""
