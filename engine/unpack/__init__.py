"""From an image's layers in the content store to committed snapshots, in worker processes."""
