"""Decode → embed → write on Ray: besides the entry points the only user of ray.

Imports `table`, `shards`, `model`, `images` and what is below them.
"""
