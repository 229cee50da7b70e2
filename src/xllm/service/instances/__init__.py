"""Engines as the front sees them: connections, hand-shake, local processes."""
