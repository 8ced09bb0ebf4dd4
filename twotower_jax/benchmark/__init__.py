"""How fast the pieces of decoding and the engine are, and how near to what the device could do."""
