"""The command line: parse, call, print. Imports everything; nothing imports it."""
