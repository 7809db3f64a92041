"""Images as files: OCI layouts, OCI archives, docker archives."""
