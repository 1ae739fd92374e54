"""Bytes on disks and in object stores, and the hub: the only user of fsspec. Imports the ground alone."""
