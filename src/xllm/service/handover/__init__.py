"""Requests that change their instance while they run: who is told what, and what happens when it fails."""
