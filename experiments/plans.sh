#!/bin/sh
# The released model on devices to rent: results/plan-*.json. Needs, for GPUs, pip install ".[cuda]"; for
# TPUs, in an environment of its own, ".[tpu]".
#
#     sh experiments/plans.sh cuda|tpu
set -e
out=experiments/results
plan() {
    file="$out/plan-$(echo "$*" | sed 's/--largest//' | tr -cd 'a-z0-9 ' | xargs | tr ' ' '-').json"
    twotower plan released --context 8192 --json --devices "$@" > "$file.new"
    mv "$file.new" "$file"
}
case "$1" in
cuda)
    plan h100x2 --rows 32 --largest; plan h200x1 --rows 32 --largest
    for experts in int8 int4; do plan h100x1 --experts $experts --mode diffusion --rows 16 --context 4096; done ;;
tpu) plan v5e:4x4 --rows 32 --largest; plan v6e:2x4 --rows 32 --largest ;;
*) echo "sh experiments/plans.sh cuda|tpu" >&2; exit 2 ;;
esac
