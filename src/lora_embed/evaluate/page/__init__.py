"""An evaluation as one HTML page, and as figures for notebooks. Imports `evaluate.records` and `report`."""
