"""Search for the weights and the method of a merge, and test the result on other images.

Imports `evaluate` and what is below it.
"""
