"""Recipes and jobs that users write, and records of tables, checked while they are read. Imports `store` and the ground."""
