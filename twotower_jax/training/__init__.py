"""Training a backbone, and the denoiser of a TwoTower whose context tower stays as it is.

`config` says what to train; `start` loads it; `data` packs documents into rows; `noise` masks blocks; `objective` is
the loss; `optimizer` the update; `sharding` splits it over devices; `loop` does steps, saves and goes on from them.
"""
