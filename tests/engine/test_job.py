"""Files of requests: every line answered once, whatever happens."""

import gzip
import io
import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import DATA, load
from jobs import good, results, run, wrapped, write

import twotower_jax as tt
from twotower_jax.engine import job
from twotower_jax.engine.lines import LONGEST, URL, raw_lines
from twotower_jax.engine.request import Request
from twotower_jax.sources import locate
from twotower_jax.tokenizer import load_tokenizer

P = {"prompt": [5, 6], "max_tokens": 3}
BAD = {
    b"{": "it is not JSON",
    b'{"custom_id": "\xff"}': "it is not UTF-8: invalid start byte at byte 15",
    b"": "it is empty",
    b"[1]": "it must be an object, not [1]",
    b"x" * 10_000_000: f"it has more than {LONGEST} bytes",
    json.dumps({"method": "POST", "url": URL, "body": P}).encode(): "custom_id must be a string",
    json.dumps({"custom_id": "r1u", "url": "/v1/chat/completions", "body": P}).encode(): "url must be",
    wrapped(1000, P | {"max_tokens": -1}): "max_tokens must be from 0 to",
    wrapped(1001, P | {"max_tokenz": 1}): "unknown key 'max_tokenz'; known are accept_probability, best_of, block_size",
    wrapped(1002, P | {"prompt": [5] * 1000}): "the prompt's 1000 tokens and 3 new ones are too long",
    wrapped(1017, P | {"block_size": 65537}): "block_size must be from 1 to 65536",
    wrapped(1018, P | {"block_size": 65536}): "block_size 65536 is too large: not one such row fits",
    wrapped(1003, P | {"prompt": [5, 128]}): "prompt has id 128 at position 1; ids go from 0 to 127",
    wrapped(1004, P | {"prompt": {"a": 1}}): "prompt must be text or a list of token ids",
    wrapped(1005, P | {"temperature": float("nan")}): "NaN is no number of JSON",
    wrapped(1006, P | {"n": 2}): "n 2 is not supported; only 1 is",
    wrapped(1019, P | {"n": True}): "n True is not supported; only 1 is",
    wrapped(1007, {"prompt": None}): "there is no prompt",
    wrapped(1008, P | {"prompt": "text"}): "the model has no tokenizer.json, so a prompt must be a list of token ids",
    wrapped(1009, P | {"prompt": [[5], [6]]}): "prompt must be one prompt",
    wrapped(1010, P | {"temperature": "hot"}): "temperature must be a number",
    wrapped(1011, P | {"mode": "fast"}): "mode 'fast' does not exist",
    b'{"prompt": [5], "prompt": [6]}': "the key 'prompt' stands twice",
    b'{"prompt": [' + b"9" * 5000 + b"]}": "it has a number of thousands of digits",
    b"[" * 100_000: "it is nested too deeply",
    b'{"prompt": [5], "text": "a"}': "it has both prompt and text",
    b'{"custom_id": "\\ud800", "prompt": [5]}': "custom_id has half of a surrogate pair",
    wrapped(1012, P | {"logprobs": 5}): "logprobs 5 is not supported",
    wrapped(1013, P | {"stop": ["a"]}): "the model has no tokenizer.json, so stop cannot be found",
    wrapped(1014, P | {"ignore_eos": 1}): "ignore_eos must be true or false",
    wrapped(1015, P | {"stop_token_ids": 5}): "stop_token_ids must be a list",
    wrapped(1016, P | {"temperature": True}): "temperature must be a number",
}


def test_bad_lines(tmp_path):
    """1,000 lines, of which 200 are wrong: 800 results, and 200 errors that say where and why."""
    wrong = [line for line in BAD if len(line) < 10**6] * 10
    wrong = [max(BAD, key=len), *wrong[:190]]
    reasons = [BAD[line] for line in wrong]
    for i, line in enumerate(wrong):  # an id that stands twice would be another reason
        wrong[i] = line.replace(b'"custom_id": "r1', b'"custom_id": "r%d1' % (i + 1))
    wrong += [good(i) for i in range(9)]
    reasons += ["custom_id 'r"] * 9
    lines = [*map(good, range(800)), *wrong]
    order = [*range(9), *(np.random.default_rng(0).permutation(len(lines) - 9) + 9).tolist()]
    source = write(tmp_path / "in.jsonl", [lines[i] for i in order])
    summary = run(source, tmp_path / "out.jsonl", positions=100)
    assert (summary.lines, summary.results, summary.errors) == (1000, 800, 200)
    found = {int(id_.split("-")[1]): r for id_, r in results(tmp_path / "out.jsonl").items()}
    assert sorted(found) == list(range(1, 1001))
    for number, i in enumerate(order, 1):
        r = found[number]
        if i < 800:
            assert r["error"] is None
            assert r["custom_id"] == f"r{i}"
            asked = json.loads(lines[i])["body"]
            (choice,), usage = r["response"]["body"]["choices"], r["response"]["body"]["usage"]
            assert usage["prompt_tokens"] == len(asked["prompt"])
            assert usage["completion_tokens"] == len(choice["token_ids"]) <= asked["max_tokens"]
        else:
            assert r["response"] is None
            assert r["error"]["line"] == number
            assert r["error"]["message"].startswith(f"line {number}: {reasons[i - 800]}")
            if reasons[i - 800].startswith("NaN"):  # of which the rest can be read
                assert r["custom_id"] == json.loads(lines[i])["custom_id"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_result_is_what_the_request_alone_gives(tmp_path):
    lines = [good(i) for i in range(20)]
    run(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    model = load("tiny-0")
    for r in results(tmp_path / "out.jsonl").values():
        body = json.loads(lines[int(r["custom_id"][1:])])["body"]
        names = {"max_tokens": "max_new_tokens", "user": None, "n": None}
        fields = {names.get(k, k): v for k, v in body.items() if names.get(k, k)}
        if body.get("temperature") and "seed" not in body:
            continue  # a seed of its own
        events = list(model.stream([Request(0, eos_token_id=model.config.eos_token_ids, **fields)], slots=8))
        answer = r["response"]["body"]
        assert answer["choices"][0]["token_ids"] == [t for e in events for t in e.tokens]
        assert answer["choices"][0]["finish_reason"] == events[-1].end
        assert answer["usage"]["denoiser_forwards"] == events[-1].denoiser_forwards


def test_goes_on(tmp_path):
    """What is answered is left out; a half-written last line is written again; order does not matter."""
    source = write(tmp_path / "in.jsonl", [*map(good, range(30)), b"not JSON"])
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(source, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    target.write_bytes(b"".join(lines[:12]) + lines[12][:-20])
    summary = run(source, target)
    assert (summary.done_before, summary.results + summary.errors) == (12, 19)
    assert sorted(target.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    before = target.read_bytes()
    assert run(source, target).done_before == 31
    assert target.read_bytes() == before


def test_another_file(tmp_path):
    """Results of another input, and files that hold something else, are not touched."""
    target = tmp_path / "out.jsonl"
    run(write(tmp_path / "in.jsonl", [good(1)]), target)
    before = target.read_bytes()
    with pytest.raises(tt.InputError, match="has the answer to another line 1, or by another model"):
        run(write(tmp_path / "other.jsonl", [good(2)]), target)
    with pytest.raises(tt.InputError, match="with other options; give the same again, or another file"):
        run(tmp_path / "in.jsonl", target, defaults={"max_new_tokens": 5})
    (tmp_path / "in.jsonl").write_bytes(good(1) + b"\r\n")  # the same line
    assert run(tmp_path / "in.jsonl", target).done_before == 1
    assert target.read_bytes() == before
    target.write_text("a diary\n")
    with pytest.raises(tt.InputError, match="line 1 is no result of this command"):
        run(tmp_path / "in.jsonl", target)
    assert target.read_text() == "a diary\n"
    with pytest.raises(tt.InputError, match=r"cannot read .*: No such file"):
        run(tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(tt.InputError, match=r"cannot write .*: it is no file"):
        run(tmp_path / "in.jsonl", tmp_path)


def test_long_requests_and_blocks_apart():
    """A long request, or one with a large block, does not take the others' slots."""
    model = load("tiny-0")
    classes = job._Classes(model, np.dtype(np.float32), job.Options(memory=30_000_000))
    wishes = [{}, {"mode": "ar"}, {"prompt": [5] * 3_000, "mode": "ar"}, {"block_size": 33}, {"block_size": 5}]
    for i, wish in enumerate(wishes):
        classes.add(i, Request(i, **({"prompt": [5], "max_new_tokens": 20} | wish)).checked(128, True))
    found = classes.found()
    assert [(c.block, c.count) for c in found] == [(16, 3), (16, 1), (64, 1)]
    assert [classes.of(i) for i in range(6)] == [found[0], found[0], found[1], found[2], found[0], None]
    assert found[0].slots > found[1].slots
    assert found[1].longest == 3_019
    plenty = job._Classes(model, np.dtype(np.float32), job.Options(memory=10**13))
    for i, wish in enumerate(wishes[:3]):
        plenty.add(i, Request(i, **({"prompt": [5], "max_new_tokens": 20} | wish)).checked(128, True))
    assert [c.count for c in plenty.found()] == [3]
    plenty.add(3, Request(3, [5], "ar", max_new_tokens=200_000).checked(128, True))  # its attention, not its memory
    assert [c.count for c in plenty.found()] == [3, 1]


def test_shards_are_the_whole(tmp_path):
    source = write(tmp_path / "in.jsonl", [*map(good, range(20)), b"{"])
    run(source, tmp_path / "whole")
    for i in range(3):
        assert run(source, tmp_path / f"part{i}", shard=(i, 3)).lines == 7
    parts = b"".join((tmp_path / f"part{i}").read_bytes() for i in range(3))
    assert sorted(parts.splitlines()) == sorted((tmp_path / "whole").read_bytes().splitlines())


def test_compressed(tmp_path):
    lines = b"\n".join(map(good, range(3)))  # no end of the last line
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(lines))
    assert run(tmp_path / "in.jsonl.gz", tmp_path / "out").results == 3
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(tt.InputError, match="cannot read"):
        run(tmp_path / "in.jsonl.gz", tmp_path / "other")


def test_text(tmp_path):
    """NVIDIA's plain lines; a stop string ends the text before it, with as few tokens as hold it."""
    tokenizer = load_tokenizer(locate("demo"))
    prompt = "sort: pear apple ="
    lines = [{"text": prompt}, {"prompt": prompt, "custom_id": "mine"}, {"prompt": prompt, "mode": "ar"}]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for target, more in ((whole, {}), (stopped, {"stop": ["pp", "nothing"]})):
        source = write(tmp_path / "in.jsonl", [json.dumps(line | more).encode() for line in lines])
        job.run(load("demo"), tokenizer, source, str(target), job.Options())
    ids = {r["custom_id"] for r in results(whole).values()}
    assert ids == {"line-1", "mine", "line-3"}
    by_id = {r["custom_id"]: r["response"]["body"]["choices"][0] for r in results(whole).values()}
    for r in results(stopped).values():
        cut, full = r["response"]["body"]["choices"][0], by_id[r["custom_id"]]
        if "pp" not in full["text"]:
            assert cut == full
            continue
        assert cut["text"] == full["text"].partition("pp")[0]
        assert cut["finish_reason"] == "stop"
        assert "pp" in tokenizer.decode(cut["token_ids"])
        assert "pp" not in tokenizer.decode(cut["token_ids"][:-1])
        assert full["token_ids"][: len(cut["token_ids"])] == cut["token_ids"]
    assert any("pp" in choice["text"] for choice in by_id.values())


def test_long_lines_cost_no_memory():
    data = b"a\n" + b"b" * (3 * LONGEST) + b"\n" + b"c"
    assert [(n, len(raw)) for n, raw, _ in raw_lines(io.BytesIO(data))] == [(1, 1), (2, LONGEST + 1), (3, 1)]


def command(source, target, *more):
    options = ["--model", str(DATA / "tiny-0"), "--dtype", "float32", "--slots", "8", *more]
    return [sys.executable, "-m", "twotower_jax.cli", "batch", str(source), str(target), *options]


def started(source, target, lines):
    """A job that has written so many lines."""
    process = subprocess.Popen(command(source, target), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 200
    while process.poll() is None and (not target.exists() or target.read_bytes().count(b"\n") < lines):
        assert time.monotonic() < end
        time.sleep(0.01)
    return process


def test_asked_to_stop(tmp_path):
    """Rows at work are finished and written; the same command goes on."""
    source = write(tmp_path / "in.jsonl", [wrapped(i, {"prompt": [5 + i % 99], "max_tokens": 60}) for i in range(150)])
    target = tmp_path / "out.jsonl"
    process = started(source, target, 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "twotower: stopped before the end; the same command goes on" in errors
    assert "Traceback" not in errors
    assert 5 <= len(results(target)) < 150
    done = subprocess.run(command(source, target, "--json"), capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    assert summary["done_before"] + summary["results"] == len(results(target)) == 150


def test_a_full_disk(tmp_path):
    source = write(tmp_path / "in.jsonl", map(good, range(60)))
    target = tmp_path / "out.jsonl"
    limited = ["sh", "-c", 'ulimit -f 20; trap "" XFSZ; exec "$@"', "sh", *command(source, target)]  # 10,240 bytes
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "File too large; what is written stays, and the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    assert 0 < len(results(target)) < 60
    run(source, target)
    run(source, tmp_path / "whole")
    assert sorted(target.read_bytes().splitlines()) == sorted((tmp_path / "whole").read_bytes().splitlines())


def killed(tmp_path, requests, times):
    source = write(tmp_path / "in.jsonl", map(good, range(requests)))
    target, rng = tmp_path / "out.jsonl", random.Random(0)
    for _ in range(times):
        before = target.read_bytes().count(b"\n") if target.exists() else 0
        process = started(source, target, before + rng.randrange(0, requests // times))
        time.sleep(rng.random() / 10)
        process.kill()
        process.communicate()
    subprocess.run(command(source, target), check=True, capture_output=True)
    subprocess.run(command(source, tmp_path / "whole"), check=True, capture_output=True)
    assert {r["custom_id"] for r in results(target).values()} == {f"r{i}" for i in range(requests)}
    assert sorted(target.read_bytes().splitlines()) == sorted((tmp_path / "whole").read_bytes().splitlines())


def test_killed(tmp_path):
    killed(tmp_path, requests=40, times=1)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    killed(tmp_path, requests=500, times=20)


BAD_OPTIONS = [
    (["--shard", "2/2"], "--shard takes I/N"),
    (["--slots", "0"], "--slots must be from 1"),
    (["--memory", "1e-6"], "not one row fits"),
    (["--mode", "mock-ar", "--eos-token-id", "x"], "--eos-token-id takes whole numbers"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(tmp_path, options, message):
    source = write(tmp_path / "in.jsonl", [good(1)])
    done = subprocess.run(command(source, tmp_path / "out", *options), capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in done.stderr
