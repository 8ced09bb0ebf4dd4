"""The command and its table: benchmarks as NVIDIA ran them, and one line for what is missing."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import DATA

import twotower_jax as tt
from twotower_jax import cli

TASKS = ["--tasks", "demo_words,demo_initials", "--include", str(DATA / "tasks")]


def refusal(capsys, *argv) -> str:
    assert cli.main(["eval", "demo", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("twotower: ")]
    return line


lm_eval = pytest.importorskip("lm_eval")

from datasets import Dataset, DatasetDict  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from twotower_jax.evaluation import benchmarks, report  # noqa: E402
from twotower_jax.evaluation.harness import Tally  # noqa: E402

MARK = "QQ"  # stands once in a question
PUBLISHED = {  # shots, and what NVIDIA published for AR and TwoTower
    "mmlu": (5, 78.56, 78.24),
    "mmlu_pro": (5, 62.59, 60.93),
    "arc_challenge": (25, 91.72, 92.66),
    "winogrande": (5, 76.09, 76.09),
    "race": (0, 88.90, 88.90),
    "humaneval": (0, 79.27, 75.58),
    "mbpp_sanitized": (3, 74.71, 74.28),
    "gsm8k": (8, 92.49, 90.14),
    "math_500": (4, 84.40, 80.60),
    "global_mmlu_lite": (5, 73.97, 73.94),
    "mgsm": (8, 80.80, 80.40),
}
EXAMPLES = {"gsm8k": "\nA: ", "math_500": "\nSolution: "}  # what ends a question of tasks whose examples are their own


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return benchmarks.find(list(PUBLISHED))[1]


class Recorder(lm_eval.api.model.LM):
    """Answers nothing, and keeps what it is asked."""

    def __init__(self, model, tokenizer, *, mode, likelihood, **options):
        super().__init__()
        self.likelihood, self.tally, self.asked = likelihood, Tally(tokens=12, denoiser_forwards=5), []
        model.append(self)

    def loglikelihood(self, requests):
        self.asked += [request.args for request in requests]
        return [(0.0, True)] * len(requests)

    def generate_until(self, requests):
        self.asked += [request.args for request in requests]
        return [""] * len(requests)

    def loglikelihood_rolling(self, requests):
        raise AssertionError


def invented(path, name=None, **_) -> DatasetDict:
    """Rows with the columns of a data set that cannot be had here."""
    categories = ["biology", "business", "chemistry", "computer science", "economics", "engineering", "health"]
    categories += ["history", "law", "math", "other", "philosophy", "physics", "psychology"]
    subjects = ["Business", "Humanities", "Medical", "Other", "STEM", "Social Sciences"]
    letters = {"A": "i", "B": "j", "C": "k", "D": "l"}
    rows = {
        "cais/mmlu": lambda i: {"question": f"{MARK} {i}", "choices": list("ijkl"), "answer": 1},
        "TIGER-Lab/MMLU-Pro": lambda i: {
            "question": f"{MARK} {i}", "options": list("ijkl"), "answer": "B", "category": categories[i % 14],
            "cot_content": "A: Let's think step by step. The answer is (B).",
        },
        "allenai/ai2_arc": lambda i: {
            "question": f"{MARK} {i}", "choices": {"text": list("ijk"), "label": list("123")}, "answerKey": "2",
        },
        "allenai/winogrande": lambda i: {
            "sentence": f"{MARK} {i} _ runs.", "option1": "i", "option2": "j", "answer": "2",
        },
        "ehovy/race": lambda i: {"article": f"a {i}", "question": MARK, "options": list("ijkl"), "answer": "C"},
        "openai/openai_humaneval": lambda i: {"prompt": f"def {MARK}{i}():\n", "test": "", "entry_point": "f"},
        "google-research-datasets/mbpp": lambda i: {
            "prompt": f"{MARK} {i}", "code": "x = 1", "test_imports": ["import math"], "test_list": ["assert 1"] * 3,
        },
        "openai/gsm8k": lambda i: {"question": f"{MARK} {i}", "answer": "So 3. #### 3"},
        "HuggingFaceH4/MATH-500": lambda i: {"problem": f"{MARK} {i}", "solution": "$\\boxed{3}$", "answer": "3"},
        "CohereLabs/Global-MMLU-Lite": lambda i: {
            "question": f"{MARK} {i}", "answer": "C", "subject_category": subjects[i % 6],
            **{f"option_{letter.lower()}": text for letter, text in letters.items()},
        },
        "juletxara/mgsm": lambda i: {
            "question": f"{MARK} {i}", "answer": "Step-by-Step Answer: 1 and 2 are 3.", "answer_number": 3,
        },
    }[path.replace("CohereForAI", "CohereLabs")]  # fmt: skip
    splits = ("train", "validation", "test", "dev", "prompt")
    return DatasetDict({s: Dataset.from_list([rows(100 * k + i) for i in range(84)]) for k, s in enumerate(splits)})


class CodeEval:
    """In the place of the metric that runs programs, which must be fetched."""

    def compute(self, references, predictions, k):
        assert len(references) == len(predictions)
        return {"pass@1": 0.5}, {}


@pytest.mark.parametrize("name", PUBLISHED)
def test_benchmarks(monkeypatch, manager, name):
    """Each loads in the harness, asks with NVIDIA's shots, and has the metric that is shown."""
    if name == "math_500":
        pytest.importorskip("math_verify")
    monkeypatch.setattr("datasets.load_dataset", invented)
    monkeypatch.setattr("evaluate.load", lambda _: CodeEval())
    monkeypatch.setattr(report, "TwoTowerLM", Recorder)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    found, asked = [benchmarks.BENCHMARKS[name]], []
    loaded = report.load_tasks(found, manager, run_code=True)
    (row,) = report.evaluate(asked, None, loaded, manager, modes=["ar", "diffusion"], limit=1, run_code=True)
    shots, ar, twotower = PUBLISHED[name]
    assert (row.shots, row.published["ar"], row.published["twotower"]) == (shots, ar, twotower)
    assert row.published["retained"] == pytest.approx(100 * twotower / ar)
    contexts = [args[0] for args in asked[0].asked]
    assert contexts
    for context in contexts:
        assert (context + " ").count(EXAMPLES.get(name, MARK)) == shots + 1
    writes = isinstance(asked[0].asked[0][1], dict)
    assert bool(asked[1].asked) == writes  # a task of log-likelihoods alone is run once
    if writes:
        assert {args[1]["max_gen_toks"] for args in asked[0].asked} <= {512, 1024, 2048}
    assert 0 <= row.modes["ar"].value <= 100


def test_the_published_quality():
    """The paper's 98.7 % of AR's quality, from its figures."""
    found = benchmarks.BENCHMARKS.values()
    assert sum(b.twotower for b in found) / sum(b.ar for b in found) == pytest.approx(0.987, abs=1e-3)


def test_table():
    modes = {
        "ar": report.Measured(80.0, 1.0, 1.0, []),
        "diffusion": report.Measured(78.0, 1.0, 4.256, []),
    }
    published = {"ar": 92.49, "twotower": 90.14, "retained": 97.459}
    rows = [
        report.Row("gsm8k", "GSM8K", "gsm8k_cot", 9, 8, "exact_match,x", True, modes, {"diffusion": 97.5}, published),
        report.Row("own", "own", "own", 9, None, "acc,none", True, modes, {"diffusion": None}, None),
    ]
    head, one, other = report.table(rows, ["ar", "diffusion"]).splitlines()
    assert re.split("  +", head.strip()) == [
        "benchmark", "shots", "metric", "ar", "diffusion", "retained", "paper AR", "paper TwoTower", "paper retained",
        "ar tokens/forward", "diffusion tokens/forward",
    ]  # fmt: skip
    assert " ".join(one.split()) == "GSM8K 8 exact_match 80.00 78.00 97.5 92.49 90.14 97.5 1.00 4.26"
    assert " ".join(other.split()) == "own - acc 80.00 78.00 - - - - 1.00 4.26"


def test_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(DATA.parents[1])
    out = tmp_path / "results.json"
    options = ["--modes", "ar,verified", "--limit", "4", "--slots", "4", "--dtype", "float32", "--out", str(out)]
    assert cli.main(["eval", "demo", *TASKS, *options]) == 0
    _, words, initials = capsys.readouterr().out.splitlines()
    assert words.split()[:6] == ["demo_words", "0", "exact_match", "100.00", "100.00", "100.0"]
    assert initials.split()[:6] == ["demo_initials", "0", "acc", "100.00", "100.00", "100.0"]
    result = json.loads(out.read_text())
    assert result["settings"]["limit"] == 4
    assert {"twotower_jax", "jax", "lm_eval"} < set(result["versions"])
    one, other = result["benchmarks"]
    assert one["samples"] == other["samples"] == 4
    assert one["modes"]["ar"]["tokens_per_forward"] == 1
    assert other["modes"]["ar"]["tokens_per_forward"] is None
    assert one["published"] is None


def test_what_is_missing(capsys, monkeypatch, manager):
    """One line each, before the model is loaded."""

    def unreachable(path, *_, **__):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(benchmarks, "TaskManager", lambda **_: manager)
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    expected = "gsm8k: the task gsm8k_cot cannot be loaded: Couldn't reach 'openai/gsm8k' on the Hub"
    assert refusal(capsys, "--tasks", "gsm8k").startswith(f"twotower: {expected}")
    expected = "humaneval runs programs that the model writes; give --run-code to allow it"
    assert refusal(capsys, "--tasks", "humaneval").startswith(f"twotower: {expected}")
    assert "nonsense is no task; give mmlu, mmlu_pro" in refusal(capsys, "--tasks", "nonsense")
    assert "--include /nowhere is no folder" in refusal(capsys, "--tasks", "a", "--include", "/nowhere")
    assert "--modes takes names such as a,b" in refusal(capsys, *TASKS, "--modes", "ar,,ar")


def test_modes_are_checked_first(manager):
    with pytest.raises(tt.InputError, match="mode 'fast' does not exist"):
        report.evaluate(tt.load("demo"), None, [], manager, modes=["ar", "fast"])


@pytest.mark.slow
def test_the_harness_own_command(tmp_path):
    """`lm_eval` knows the model."""
    arguments = ["--model", "twotower", "--model_args", "pretrained=demo,mode=verified,dtype=float32"]
    arguments += ["--tasks", "demo_words", "--include_path", str(DATA / "tasks"), "--limit", "4"]
    command = [sys.executable, "-m", "twotower_jax.evaluation", "run", *arguments]
    done = subprocess.run(command, cwd=DATA.parents[1], env=os.environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert re.search(r"demo_words.*exact_match.*1\b", done.stdout)
