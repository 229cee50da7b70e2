"""Scheduling policy: which rows of which sequences make up the next step. Torch-free."""
