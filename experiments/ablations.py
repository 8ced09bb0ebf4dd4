"""What carries the shipped model: parts of what the denoiser is given are taken away while it decodes.

    python -m experiments.ablations

"no Mamba seeding" starts its Mamba layers from zeros; "no context attention" hides the context's keys and values;
"time held still" says at every step that all is masked; "all at once" commits a whole block after its first pass. Most
blocks are done in a pass or two, in which time hardly moves; so it is held still at one token a pass as well.
"""

from unittest import mock

import jax
import jax.numpy as jnp

import twotower_jax as tt
from experiments import harness
from experiments.evaluate import evaluate, line
from twotower_jax import two_tower
from twotower_jax.state import MambaState, TowerState


def unseeded(state: TowerState, t):
    layers = [jax.tree.map(jnp.zeros_like, z) if isinstance(z, MambaState) else z for z in state.layers]
    return TowerState(tuple(layers), state.length, state.first), t


def unattended(state: TowerState, t):
    return TowerState(state.layers, state.length, state.length), t


def whole(state: TowerState, t):
    return state, t


def still(state: TowerState, t):
    return state, jnp.ones_like(t)


ABLATIONS = {
    "as trained": (whole, "g0.8_T16"),
    "no Mamba seeding": (unseeded, "g0.8_T16"),
    "no context attention": (unattended, "g0.8_T16"),
    "time held still": (still, "g0.8_T16"),
    "all at once": (whole, "g0.8_T1"),
    "one at a time": (whole, "g1_T16"),
    "one at a time, time held still": (still, "g1_T16"),
}


def ablated(change):
    """The library with another `two_tower.denoise`, which gets what `change` leaves of the state and the time."""
    original = two_tower.denoise

    def denoise(config, params, state, block, t, *size):
        state, t = change(state, t)
        return original(config, params, state, block, t, *size)

    return mock.patch.object(two_tower, "denoise", denoise)


def draw(axes, results):
    names = list(results["ablations"])[::-1]
    found = [results["ablations"][name] for name in names]
    axes.barh(names, [100 * r["exact_match"] for r in found])
    for at, r in enumerate(found):
        axes.annotate(f"{r['tokens_per_forward']:.1f} tokens a forward", (102, at), va="center", fontsize=8)
    axes.set(xlim=(0, 135), xticks=range(0, 101, 20), xlabel="exact match, %", title="What the denoiser needs")


def main():
    args = harness.parser(__doc__).parse_args()
    examples = harness.examples(args.rows)
    results = {"rows": len(examples), "ablations": {}}
    for name, (change, mode) in ABLATIONS.items():
        with ablated(change):
            results["ablations"][name] = found = evaluate(tt.load("demo", dtype="float32"), examples, mode)
        print(line(name, found), flush=True)
    harness.save("ablations", results, draw)


if __name__ == "__main__":
    harness.command(main)
