"""Cells on disk and their way into memory: build a store, open it, read it in training order."""
