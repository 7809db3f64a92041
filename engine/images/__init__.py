"""Images as those see them who hold them: how far each is, by the CRI, for owners."""
