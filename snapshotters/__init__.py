"""The snapshotters that come with lamina; docs/snapshotters.md tells how to add one."""
