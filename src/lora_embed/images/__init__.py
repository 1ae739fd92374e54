"""One image: its encoded bytes → pixels of the encoder's size, or a reject. Imports the ground alone."""
