"""Registries: what their hosts are, how they are asked, and how blobs come from them."""
