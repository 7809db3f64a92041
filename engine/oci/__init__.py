"""The vocabulary of OCI images: digests, descriptors, documents, platforms, references. Pure."""
