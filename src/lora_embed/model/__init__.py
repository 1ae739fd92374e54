"""The model side: adapters, merging, the encoder and what it does to pixels."""
