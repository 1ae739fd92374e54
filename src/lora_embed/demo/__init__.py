"""A real base model, trained adapters and images for demo, tests and benchmarks. Imports everything but `cli`."""
