#!/bin/sh
# How fast it is, and how near to what the device could do: results/bench-*.json and .png.
#
#     sh experiments/bench.sh cpu|h100|h200
#
# cpu: `mid` in float32, beside figures of NVIDIA's code. h200: the released model with random weights in bfloat16, both
# towers on one GPU. h100: the same with experts in 8 bits, in which both fit. A run that is stopped leaves what it has
# measured in results/bench-*.json.new, which `python -m experiments.bench` draws as well.
set -e
out=experiments/results
bench() {
    model="$1"
    file="$out/bench-$model-$device.json"
    shift
    twotower bench "$model" --out "$file.new" "$@"
    mv "$file.new" "$file"
    python -m experiments.bench "$file"
}
device="$1"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.97}"
case "$device" in
cpu) bench mid --dtype float32 --rows 1 2 4 8 16 --context 64 --passes 5.4 16 ;;
h200) bench released --rows 1 16 32 64 --context 256 --passes 5.4 ;;
h100) bench released --rows 1 16 32 --context 256 --passes 5.4 --experts int8 ;;
*) echo "sh experiments/bench.sh cpu|h100|h200" >&2; exit 2 ;;
esac
