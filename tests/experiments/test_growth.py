"""What is timed as work grows is there, and what memory is computed is what the arrays take."""

from experiments import growth
from twotower_jax.benchmark import subject


def test_of_each_context():
    model = subject.find("tests/data/tiny-0/config.json", "float32")
    model.hold("context", "denoiser")
    assert set(growth.passes(model, 2, 32)) == set(growth.STEPS)
    assert growth.prompt(model, 32) > 0
    for context in (32, 48):
        assert len(set(growth.memory(model, context).values())) == 1
