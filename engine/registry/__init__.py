"""Registries: what their hosts are, how they are asked, how blobs come from them and go there."""
