"""Clips as files: MP4, WebM, GIF, frames and sound, written and read back."""
