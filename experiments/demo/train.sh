#!/bin/sh
# The shipped model from nothing, on 2 CPU cores: a backbone, more of it, and a denoiser for it.
# Run from the project's root; each step goes on where it stopped. The result is experiments/work/demo.
set -e
[ -f experiments/work/train.jsonl ] || python -m experiments.demo.tasks experiments/work
twotower train experiments/demo/backbone.toml
twotower train experiments/demo/backbone-more.toml
[ -d experiments/work/backbone ] || twotower convert experiments/work/backbone-more/model experiments/work/backbone --to-hf
twotower train experiments/demo/denoiser.toml
twotower train experiments/demo/refine.toml
[ -d experiments/work/demo ] || twotower convert experiments/work/refine/model experiments/work/demo --to-hf
