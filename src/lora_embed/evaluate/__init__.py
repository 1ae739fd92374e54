"""Encoders compared on labelled images: metrics, intervals, heads, and what was found as plain data."""
