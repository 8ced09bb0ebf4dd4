"""Without lm-evaluation-harness."""

import sys

from twotower_jax import cli


def test_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["eval", "demo", "--tasks", "gsm8k"]) == 2
    line = 'twotower: eval needs lm-evaluation-harness: pip install "twotower_jax[eval]"\n'
    assert capsys.readouterr() == ("", line)
