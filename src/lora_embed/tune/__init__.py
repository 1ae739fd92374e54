"""A search for the weights and the method of a merge, and the proof of what it found.

Imports `evaluate` and what is below it.
"""
