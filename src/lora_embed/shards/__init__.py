"""Inputs → shards → samples, from tars, Parquet files and loose images. Imports `images`, `monitor`, `store` and the ground."""
