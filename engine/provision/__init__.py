"""Root file systems of containers: made of images, pinned while in use, gone when they should be."""
