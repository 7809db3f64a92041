"""Measurements of lamina beside other tools, and the real images that they and tests work on."""
