"""lm-evaluation-harness's own command, which knows the model `twotower` then: python -m twotower_jax.evaluation run ..."""

from lm_eval.__main__ import cli_evaluate

from twotower_jax.evaluation import harness  # noqa: F401

if __name__ == "__main__":
    cli_evaluate()
