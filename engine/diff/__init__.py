"""From a layer's bytes to a tree: decompress, hash, read the archive, apply the layer rules."""
