"""Streams under faults: does every client get what it would have got, and how long did it wait?"""
