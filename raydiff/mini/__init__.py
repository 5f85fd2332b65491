"""Miniature models trained from scratch on drawn scenes: small enough to ship with the package."""
