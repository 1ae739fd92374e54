"""Decode → embed → write on Ray. Only this folder imports ray.

Imports `table`, `shards`, `model`, `images` and what is below them.
"""
