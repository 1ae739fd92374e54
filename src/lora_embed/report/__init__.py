"""The frame of all pages and a run's own page. Imports `monitor` and the ground."""
