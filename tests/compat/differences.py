"""The known differences between our trees and those of other tools, each with its reason."""

from collections.abc import Mapping

__all__ = ["KNOWN"]

KNOWN: Mapping[str, Mapping[bytes, str]] = {"umoci": {}, "containerd": {}}
"""By tool, the paths whose entries may differ and why. Empty: there is no known difference.

A difference that is not listed fails a test, and so does a listed one that is not there any more.
"""
