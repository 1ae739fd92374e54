"""A job from its file to a published version.

Imports `gates`, `report`, `chain`, `table` and what is below them.
"""
