#!/bin/sh
# The shipped model from nothing, on 2 CPU cores in about 1.5 hours: a backbone, more of it, a denoiser, more of that.
# Run from the project's root; each step goes on where it stopped. The result is experiments/work/demo.
set -e
work=experiments/work
[ -f $work/tokenizer.json ] || python -m experiments.demo.tasks $work
twotower train experiments/demo/backbone.toml
twotower train experiments/demo/backbone-more.toml
[ -d $work/backbone ] || twotower convert $work/backbone-more/model $work/backbone --to-hf
twotower train experiments/demo/denoiser.toml
twotower train experiments/demo/refine.toml
twotower train experiments/demo/refine-more.toml
[ -d $work/demo ] || twotower convert $work/refine-more/model $work/demo --to-hf
cp $work/samples.json $work/demo
