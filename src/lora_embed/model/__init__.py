"""Base, adapters → one encoder; the only user of PEFT and transformers. Imports `images`, `config`, `store` and the ground."""
