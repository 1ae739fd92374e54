"""Decode → embed → write on Ray. Besides the entry points, only this folder imports ray.

Imports `table`, `shards`, `model`, `images` and what is below them.
"""
