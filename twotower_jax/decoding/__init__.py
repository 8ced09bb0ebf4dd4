"""Pure decoding rules, which `engine` applies.

Rules are frozen dataclasses that are pytrees: numbers that a sweep changes are traced, so that no program is compiled
for each value of a threshold.
"""

MODES = ("diffusion", "ar", "mock-ar", "verified")
BLOCK_MODES = ("diffusion", "verified")
