"""Compare encoders on labelled images: figures with intervals, adapters' own heads, and pages.

Imports `run`, `chain`, `vectors` and what is below them.
"""
