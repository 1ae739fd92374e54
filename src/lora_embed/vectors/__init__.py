"""Measures of vectors: lengths, neighbours, agreement of two sets. In NumPy; imports only `errors` of this package."""
