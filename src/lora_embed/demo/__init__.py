"""Real parts, trained adapters and pictures for the demo, the tests and the benchmarks. Imports everything but `cli`."""
