"""The mixers: for each the maths as plain functions, and a thin Linen module over them.

Every mixer is called as `mixer(x, state, span)` with x (B, L, D) and returns (y (B, L, D), new state).
"""
