"""Nearest images of a query, and indexes. Imports `report`, `table`, `images` and what is below them."""
