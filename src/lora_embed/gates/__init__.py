"""Decide whether a version may be published: gates compare figures of its vectors with limits.

Imports `chain`, `table`, `vectors` and what is below them.
"""
