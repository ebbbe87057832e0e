"""Bytes and truth on disk."""
