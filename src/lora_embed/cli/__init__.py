"""The command line: parse options, call a function, print its result. Imports everything; nothing imports it."""
