"""Encoders compared on labelled images: figures with intervals, heads put back, and pages.

Imports `run`, `chain`, `vectors` and what is below them.
"""
