"""May this version be published? Figures held against limits. Imports `chain`, `table`, `vectors` and what is below them."""
