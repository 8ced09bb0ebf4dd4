#!/bin/sh
# The shipped model from nothing, on 2 CPU cores in about 1.5 hours: a backbone, more of it, a denoiser, more of that.
# Run from the project's root; each step goes on where it stopped. The result is experiments/runs/demo.
set -e
runs=experiments/runs
[ -f $runs/tokenizer.json ] || python -m experiments.demo.tasks $runs
twotower train experiments/demo/backbone.toml
twotower train experiments/demo/backbone-more.toml
[ -d $runs/backbone ] || twotower convert $runs/backbone-more/model $runs/backbone --to-hf
twotower train experiments/demo/denoiser.toml
twotower train experiments/demo/refine.toml
twotower train experiments/demo/refine-more.toml
[ -d $runs/demo ] || twotower convert $runs/refine-more/model $runs/demo --to-hf
cp $runs/samples.json $runs/demo
