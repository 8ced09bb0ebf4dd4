"""How probable given texts are: exactly, by the context tower, or by the denoiser, of which there is a bound.

Texts are read in `pieces`, of which those that texts begin with in common are read once; what the context tower has
read after a piece is held on the devices for as long as something follows it.
"""
