"""Find the nearest images of a query, and make indexes. Imports `report`, `table`, `images` and what is below them."""
