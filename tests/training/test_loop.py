"""A run that is stopped and goes on is the same run; only what is to be trained changes."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import largest_difference

import twotower_jax as tt
from convert import convert
from twotower_jax.checkpoint import TrainingCheckpoints
from twotower_jax.cli import main
from twotower_jax.training import data
from twotower_jax.training.config import read_training_config
from twotower_jax.training.loop import run
from twotower_jax.training.start import BYTES, Start
from twotower_jax.training.state import begin, export


def trained(c):
    ended = run(c, Start(c))
    assert ended.finished
    return tt.load(f"{c.output}/model", dtype="float32")


def difference(one, other) -> float:
    """The largest between the last checkpoints of two runs, of parameters (float32) and the optimiser's moments."""

    def last(c):
        state = begin(c, Start(c), TrainingCheckpoints(Path(c.output) / "checkpoints", c.keep, reads_only=True))
        assert state.step == c.steps
        return state.trained, state.optimizer

    return largest_difference(last(one), last(other))


def losses(c) -> list[tuple[int, float]]:
    with open(f"{c.output}/metrics.jsonl") as file:
        whole = [line for line in file if line.endswith("\n")]  # a killed process may leave a part of one
    return [(line["step"], line["loss"]) for line in map(json.loads, whole)]


def stop_at(monkeypatch, number, batch):
    """A signal while a batch is made."""
    made, count = data.Packer.__next__, [0]

    def counted(self):
        count[0] += 1
        if count[0] == batch:
            signal.raise_signal(number)
        return made(self)

    monkeypatch.setattr(data.Packer, "__next__", counted)


def test_resumed_is_uninterrupted(settings, backbone, monkeypatch):
    """Losses and parameters, bit for bit; stopped within a stage, at its end, and in the next one."""
    whole = settings("denoise", "whole", backbone, two_stages=True)
    trained(whole)
    c = settings("denoise", "stopped", backbone, two_stages=True)
    done = 0
    for number, batch in (signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGTERM, 1):
        with monkeypatch.context() as patch:
            stop_at(patch, number, batch)
            ended = run(c, Start(c))
        done += batch
        assert (ended.step, ended.finished) == (done, False)
        assert not os.path.exists(f"{c.output}/model")
    trained(c)
    assert losses(c) == losses(whole)
    assert [step for step, _ in losses(c)] == list(range(1, 9))
    assert difference(c, whole) == 0


def test_bad_data_loses_nothing(settings, monkeypatch):
    """A line that is no document ends the run, which goes on when the line is mended."""
    whole, c = settings("ar", "whole"), dataclasses.replace(settings("ar", "stopped"), save_every=100)
    expected = trained(whole)
    made, count = data.Packer.__next__, [0]

    def fail(self):
        count[0] += 1
        if count[0] == 3:
            raise tt.InputError("line 5: not JSON")
        return made(self)

    with monkeypatch.context() as patch:
        patch.setattr(data.Packer, "__next__", fail)
        with pytest.raises(tt.InputError, match="line 5"):
            run(c, Start(c))
    assert (Path(c.output) / "checkpoints" / "2").is_dir()
    model = trained(c)
    assert losses(c) == losses(whole)
    assert largest_difference(model.params, expected.params) == 0


def test_denoiser_alone_changes(settings, backbone, home):
    """The context tower's bytes are the backbone's; the denoiser starts as its copy and moves."""
    base = tt.load(home / backbone, dtype="float32")
    c = settings("denoise", "two", backbone)
    begun = Start(c).trained()
    for name in ("tower", "head"):
        assert largest_difference(begun[name], base.params["context"][name]) == 0
    start = Start(c)
    assert run(c, start).finished
    model = tt.load(f"{c.output}/model", dtype="float32")
    for context in (start.frozen, model.params["context"]):  # what was trained with, and what is written
        assert largest_difference(context, base.params["context"]) == 0
    for name in ("tower", "head", "time"):
        assert largest_difference(model.params["denoiser"][name], begun[name]) > 1e-4
    assert losses(c)[-1][1] < losses(c)[0][1]
    convert(f"{c.output}/model", home / "hf", hf=True)  # and NVIDIA's layout of it is the same model
    prompt = [[40, 41, 42]]
    again = tt.load(home / "hf", dtype="float32")
    assert again.generate_mask_diffusion(prompt, 16).tokens == model.generate_mask_diffusion(prompt, 16).tokens


def test_fresh_towers_are_the_backbone(settings, backbone, home):
    """At step 0 mock-AR is AR, token for token."""
    base = tt.load(home / backbone, dtype="float32")
    c = settings("denoise", "two", backbone)
    params = {"context": base.params["context"], "denoiser": Start(c).trained()}
    model = tt.Model(base.config, params)
    prompts = [[40, 41, 42], [50] * 9]
    assert model.generate_mock_ar(prompts, 24).tokens == base.generate_ar(prompts, 24).tokens


@pytest.mark.slow
def test_tied_towers_are_one(settings, backbone):
    model = trained(settings("tied", "tied", backbone))
    for name in ("tower", "head"):
        assert largest_difference(model.params["context"][name], model.params["denoiser"][name]) == 0


def test_parts_of_a_step_add_up(settings):
    """AR has no noise, whose keys are the parts' own: two halves of the rows are one step's."""
    one = trained(settings("ar", "one"))
    two = trained(settings("ar", "two", more="accumulate = 2\nremat = true"))
    assert 0 < largest_difference(one.params, two.params) < 2e-2  # exported in bfloat16


def test_ar_weight_keeps_mock_ar(settings, backbone):
    """With the weight the denoiser's next-token loss is part of its own."""
    plain, mixed = (settings("denoise", f"w{w}", backbone, f"ar_weight = {w}") for w in (0.0, 1.0))
    trained(plain)
    trained(mixed)
    assert losses(mixed)[0][1] > losses(plain)[0][1] + 1


def test_bfloat16_compute_keeps_float32_masters(settings):
    c = dataclasses.replace(settings("ar"), dtype="bfloat16")
    start = Start(c)
    assert {leaf.dtype for leaf in jax.tree.leaves(start.trained())} == {jnp.dtype(jnp.float32)}
    model = trained(c)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))


def test_another_model_for_the_same_folder(settings, backbone, home, tmp_path_factory):
    """A run goes on where its folder has been moved to, with the model that it began from and no other."""
    first = trained(settings("denoise", "two", backbone))
    moved = tmp_path_factory.mktemp("there") / "moved"
    shutil.copytree(home, moved)
    shutil.rmtree(moved / "two" / "model")
    model = trained(read_training_config(moved / "two.toml"))
    assert largest_difference(model.params, first.params) == 0
    other = Start(dataclasses.replace(settings("ar"), seed=1))
    other.export(other.trained(), home / "other")
    c = settings("denoise", "two", "other")
    with pytest.raises(tt.InputError, match="holds a run with another model"):
        run(c, Start(c))


def test_another_run_in_the_same_folder(settings):
    trained(settings("ar"))
    other = settings("ar", more="weight_decay = 0.5")
    with pytest.raises(tt.InputError, match="holds a run with another weight_decay"):
        run(other, Start(other))


def test_a_loss_that_is_not_finite(settings):
    """Ends the run, and no checkpoint of it is kept."""
    c = settings("ar")
    c = dataclasses.replace(c, stages=(dataclasses.replace(c.stages[0], learning_rate=1e30),), log_every=100)
    with pytest.raises(tt.InputError, match=r"the loss is .* at step 3; remove .*/run and start again with a smaller"):
        run(c, Start(c))
    assert not any(path.name.isdigit() for path in (Path(c.output) / "checkpoints").iterdir())


def test_bad_starts(settings, home):
    (home / "bare").mkdir()
    (home / "bare" / "config.json").write_text((home / "base" / "config.json").read_text())
    few = convert("demo", home / "few", experts="int8").target
    cases = {
        "starts from a trained backbone": settings("denoise"),
        "objective ar trains a backbone": dataclasses.replace(settings("ar"), model="demo"),
        "tokenizer.json does not exist; give data.tokenizer": dataclasses.replace(
            settings("ar"), data=dataclasses.replace(settings("ar").data, tokenizer="")
        ),
        "has int8 experts, which are not trained; give its source": dataclasses.replace(settings("ar"), model=str(few)),
        "mask_token_id 999": dataclasses.replace(settings("ar"), mask_token_id=999),
    }
    for message, c in cases.items():
        with pytest.raises(tt.InputError, match=message):
            Start(c)


def test_tokenizer_larger_than_the_vocabulary(settings, home):
    raw = json.loads((home / "base" / "config.json").read_text())
    (home / "base" / "config.json").write_text(json.dumps(raw | {"vocab_size": 100}))
    with pytest.raises(tt.InputError, match="tokens, more than the model's vocabulary of 100"):
        Start(settings("ar"))


def test_export_of_a_run_so_far(settings, home, capsys):
    """A checkpoint's model: of the newest and of an earlier step; the last is what the run itself gives."""
    c = dataclasses.replace(settings("ar"), save_every=2)
    final = trained(c)
    start = Start(c)
    assert export(c, start, home / "at2", 2) == 2
    assert export(c, start, home / "newest") == 4
    early, newest = tt.load(home / "at2", dtype="float32"), tt.load(home / "newest", dtype="float32")
    assert largest_difference(newest.params, final.params) == 0
    assert largest_difference(early.params, final.params) > 1e-4
    with pytest.raises(tt.InputError, match="has no checkpoint of step 3; there are 2, 4"):
        export(c, start, home / "at3", 3)
    with pytest.raises(tt.InputError, match="at2 exists"):
        export(c, start, home / "at2", 2)
    with pytest.raises(tt.InputError, match="holds no run"):
        export(settings("ar", "none"), start, home / "none")
    assert main(["export", str(home / "run.toml"), str(home / "by-command")]) == 0
    assert "step 4" in capsys.readouterr().out
    assert (home / "by-command" / "config.json").is_file()


def test_export_while_the_run_writes(settings, home, monkeypatch):
    """What is being written stays, and so does the run."""
    c = dataclasses.replace(settings("ar"), save_every=2)
    trained(c)
    unfinished = Path(c.output) / "checkpoints" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "part").write_text("half")
    export(c, Start(c), home / "newest")
    assert (unfinished / "part").read_text() == "half"


def test_one_job_a_folder(settings, monkeypatch):
    c = settings("ar")
    made = data.Packer.__next__

    def again(self):
        with pytest.raises(tt.InputError, match="run is being trained by another process"):
            run(c, Start(c))
        return made(self)

    monkeypatch.setattr(data.Packer, "__next__", again)
    assert run(c, Start(c)).finished


def test_the_model_that_a_run_starts_from_stays(settings, backbone, home):
    os.renames(home / backbone, home / "here" / "model")
    c = settings("denoise", "here", "here/model")
    before = sorted((home / "here" / "model").iterdir())
    with pytest.raises(tt.InputError, match="here/model is the model that the run starts from and would write"):
        run(c, Start(c))
    assert sorted((home / "here" / "model").iterdir()) == before
    shutil.copytree(home / "here" / "model", home / "other" / "model")
    c = settings("denoise", "other", "here/model")
    with pytest.raises(tt.InputError, match="other/model is there, but the run that made it is not"):
        run(c, Start(c))


def test_another_architecture_or_tokenizer(settings, home):
    """Of the same shapes, even; one line says what is different."""
    c = settings("ar")
    trained(c)
    file = home / "base" / "config.json"
    raw = json.loads(file.read_text())
    for name, value in {"num_experts_per_tok": 1, "mamba_num_heads": 8}.items():
        file.write_text(json.dumps(raw | {name: value}))
        with pytest.raises(tt.InputError, match="holds a run with another model's "):
            run(c, Start(c))
    file.write_text(json.dumps(raw))
    tokenizer = json.loads((BYTES / "tokenizer.json").read_text())
    (home / "tokenizer.json").write_text(json.dumps(tokenizer))
    other = dataclasses.replace(c, data=dataclasses.replace(c.data, tokenizer=str(home / "tokenizer.json")))
    with pytest.raises(tt.InputError, match="holds a run with another tokenizer"):
        run(other, Start(other))


def test_a_damaged_checkpoint(settings, capfd):
    """One line says which, and the one before it goes on when it is removed."""
    c = dataclasses.replace(settings("ar"), save_every=2)
    expected = trained(c)
    shutil.rmtree(f"{c.output}/model")
    newest = Path(c.output) / "checkpoints" / "4"
    largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(tt.InputError, match="checkpoints/4 cannot be read; if it is damaged, remove it to go on from"):
        run(c, Start(c))
    shutil.rmtree(newest)
    assert largest_difference(trained(c).params, expected.params) == 0


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "tensorboard", "model"])
def test_a_folder_that_is_no_runs(settings, name):
    c = settings("ar")
    path = Path(c.output) / name
    path.parent.mkdir()
    path.mkdir() if name == "metrics.jsonl" else path.write_text("x")
    with pytest.raises(tt.InputError, match=f"{name} is a .*; give another output"):
        run(c, Start(c))
    shutil.rmtree(c.output)
    Path(c.output).write_text("x")
    with pytest.raises(tt.InputError, match="cannot be made: File exists"):
        run(c, Start(c))


def test_text_is_never_a_special_token_of_bytes(settings, home):
    """With another tokenizer [MASK] is one, and may not be learned."""
    (home / "data.jsonl").write_text(json.dumps({"text": "a <mask>"}) + "\n")
    start = Start(settings("ar"))
    assert start.documents[0].tokens.tolist() == [byte + 4 for byte in b"a <mask>\n"]


@pytest.mark.slow
def test_kill_nine_times_ten(settings, backbone, home):
    """Killed at ten random moments of its training and started again each time: losses and parameters as without."""
    steps, rng = 300, random.Random(0)

    def longer(output):
        settings("denoise", output, backbone)
        file = home / f"{output}.toml"
        file.write_text(file.read_text().replace("steps = 4", f"steps = {steps}"))
        return read_training_config(file)

    whole = longer("whole")
    trained(whole)
    c = longer("killed")
    command = [sys.executable, "-m", "twotower_jax.cli", "train", str(home / "killed.toml")]
    for moment in sorted(rng.sample(range(5, steps - 20), 10)):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not os.path.exists(f"{c.output}/metrics.jsonl") or len(losses(c)) < moment:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))  # within a step, or a checkpoint's writing
            process.kill()
        assert not os.path.exists(f"{c.output}/model")
    subprocess.run(command, check=True, capture_output=True)
    assert losses(c) == losses(whole)
    assert len(losses(c)) == steps
    assert difference(c, whole) == 0
