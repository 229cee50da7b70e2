"""Models: a registry, the weight loader, and one file of plain functions per architecture.

Imports ops and nouns only: no torch, no platform, no file formats.
"""
