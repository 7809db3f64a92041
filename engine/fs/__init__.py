"""Files by descriptor and name: nothing here follows a path that an image could bend."""
