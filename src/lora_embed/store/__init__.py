"""Files on local disks, in object stores and on the Hugging Face hub; the only user of fsspec. Imports the ground alone."""
