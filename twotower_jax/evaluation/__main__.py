"""`python -m twotower_jax.evaluation`: lm-evaluation-harness's own command, which then knows the model `twotower`."""

from lm_eval.__main__ import cli_evaluate

from twotower_jax.evaluation import harness  # noqa: F401

if __name__ == "__main__":
    cli_evaluate()
