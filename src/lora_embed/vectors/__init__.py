"""What a set of vectors is like: lengths, neighbours, agreement. NumPy alone; imports nothing of this package but `errors`."""
