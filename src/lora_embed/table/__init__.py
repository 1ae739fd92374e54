"""The format of a table: parts, data files, manifests, versions. No Ray.

Imports `model`, `monitor`, `vectors` and what is below them.
"""
