"""Names and pins: images and leases, as records in `meta.lmdb`."""
