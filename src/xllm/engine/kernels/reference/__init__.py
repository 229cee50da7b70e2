"""The reference backend: torch tensors, exact by construction, simple before fast.

Imports torch; only `engine.platform` may import this package.
"""
