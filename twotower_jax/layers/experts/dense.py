"""All experts for every token: near the least bytes where the tokens choose most experts."""

import jax
import jax.numpy as jnp

from twotower_jax.layers import mlp
from twotower_jax.layers.linear import einsum

# Beyond it the (E, tokens, F) activations of one product over all experts would take too much memory.
TOKENS_AT_ONCE = 1024


def spread(experts, weights, total):
    """Weights (tokens, E), 0 for those not chosen."""
    tokens = experts.shape[0]
    return jnp.zeros((tokens, total)).at[jnp.arange(tokens)[:, None], experts].set(weights)


def together(x, experts, weights, up, down):
    """All experts in one product."""
    weights = spread(experts, weights, up.shape[0])
    hidden = mlp.relu2(einsum("td,efd->etf", x, up))
    hidden *= weights.T[..., None].astype(x.dtype)
    return einsum("etf,efd->td", hidden, down, out=jnp.float32)


def in_pieces(x, experts, weights, up, down):
    """All experts, for `TOKENS_AT_ONCE` tokens after the other."""
    tokens = x.shape[0]

    def pieces(z):
        z = jnp.pad(z, ((0, -tokens % TOKENS_AT_ONCE), (0, 0)))
        return z.reshape(-1, TOKENS_AT_ONCE, z.shape[1])

    y = jax.lax.map(lambda piece: together(*piece, up, down), tuple(map(pieces, (x, experts, weights))))
    return y.reshape(-1, x.shape[1])[:tokens]
