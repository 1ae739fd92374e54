"""The format of a table: parts, data files, manifests, versions. Nothing here uses Ray.

Imports `model`, `monitor`, `vectors` and what is below them.
"""
