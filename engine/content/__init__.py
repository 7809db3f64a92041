"""The content store: blobs by digest, as uniform extents in LMDB."""
