"""The face: a row is alone, any number of tokens, any dtype that exists, and one clear line for bad input."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import byte_ids, golden_of, load

import twotower_jax as tt
from twotower_jax import memory
from twotower_jax.inputs import bucket

LATER = pytest.mark.slow  # mock-AR runs the loop that diffusion runs, and appends tokens as AR does
MODES = ["generate_mask_diffusion", "generate_ar", pytest.param("generate_mock_ar", marks=LATER)]


@pytest.mark.parametrize("mode", MODES)
def test_sampled_row_is_alone(tiny, mode):
    """Neither the other rows nor the slot change a sampled row; its number does."""
    generate = getattr(tiny.model, mode)
    options = {"max_new_tokens": 24, "temperature": 1.0, "seed": 5}
    batch = generate(tiny.prompts, **options)
    alone = generate([tiny.prompt(2)], rows=[2], **options)
    assert alone.tokens[0] == batch.tokens[2]
    assert alone.forwards[0] == batch.forwards[2]
    shuffled = generate([tiny.prompt(3), tiny.prompt(2)], rows=[9, 2], **options)
    assert shuffled.tokens[1] == batch.tokens[2]
    assert shuffled.tokens[0] != batch.tokens[3]
    same = generate([tiny.prompt(2)] * 3, **options)
    assert len({tuple(tokens) for tokens in same.tokens}) == 3
    assert generate([tiny.prompt(2)], rows=[2], **options | {"seed": 6}).tokens != alone.tokens


@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_tokens(tiny, mode):
    """Fewer tokens are a prefix of more; none are none."""
    generate = getattr(tiny.model, mode)
    most = generate(tiny.prompts, max_new_tokens=40)
    for count in (1, 7, 16, 17, 33):
        some = generate(tiny.prompts, max_new_tokens=count)
        assert some.tokens == [tokens[:count] for tokens in most.tokens]
    none = generate(tiny.prompts, max_new_tokens=0)
    assert none.tokens == [[]] * 4
    assert none.forwards == [0] * 4
    assert generate([], max_new_tokens=8).tokens == []


@pytest.mark.parametrize("mode", MODES)
def test_one_token_prompt(tiny, mode):
    g = getattr(tiny.model, mode)([[7], tiny.prompt(0)], max_new_tokens=16)
    assert g.errors == [None, None]
    alone = getattr(tiny.model, mode)([[7]], max_new_tokens=16)
    assert alone.tokens[0] == g.tokens[0]


def test_prompt_may_hold_the_mask_id(tiny):
    """Masked is an array: an id 3 in the prompt is a token like any other."""
    prompt = [5, 3, 3, 9]
    logits = tiny.model.context_logits(prompt)
    assert np.abs(logits[1:] - tiny.model.context_logits([5, 4, 4, 9])[1:]).max() > 1e-3
    g = tiny.model.generate_mask_diffusion([prompt, [5, 6]], 16)
    assert g.tokens[0] == tiny.model.generate_mask_diffusion([prompt], 16).tokens[0]
    assert 3 not in g.tokens[0]


@pytest.mark.parametrize("mode", ["generate_ar", "generate_mock_ar"])
def test_a_draw_is_of_its_position(tiny, mode):
    """A sample goes on the same when its first tokens become the prompt: keys are of positions, not of steps."""
    generate = getattr(tiny.model, mode)
    options = {"temperature": 1.0, "seed": 3, "rows": [4]}
    whole = generate([tiny.prompt(1)], 20, **options).tokens[0]
    rest = generate([[*tiny.prompt(1).tolist(), *whole[:7]]], 13, **options).tokens[0]
    assert rest == whole[7:]


@pytest.mark.parametrize("mode", MODES)
def test_non_finite_logits_end_their_row_alone(tiny, mode):
    """A token whose embedding is not a number ends the row that reads it, with an error, and no other."""
    tower = tiny.model.params["context"]["tower"]
    poisoned = tower | {"embeddings": tower["embeddings"].at[9].set(jnp.nan)}
    params = tiny.model.params | {"context": tiny.model.params["context"] | {"tower": poisoned}}
    model = tt.Model(tiny.model.config, params)
    healthy = [int(token) for token in tiny.prompt(0) if token != 9]
    g = getattr(model, mode)([healthy, [5, 9, 6]], 16)
    assert g.errors == [None, "a logit was not finite; the row ends before it"]
    assert g.tokens == [getattr(tiny.model, mode)([healthy], 16).tokens[0], []]
    assert g.forwards[1] == 1


def test_several_eos_ids(tiny):
    full = tiny.model.generate_ar([tiny.prompt(0)], 40).tokens[0]
    ends = [full[20], full[12]]
    g = tiny.model.generate_ar([tiny.prompt(0)], 40, eos_token_id=ends)
    first = min(full.index(end) for end in ends)
    assert g.tokens[0] == full[: first + 1]
    assert g.forwards == [first + 1]


def test_copies_of_a_backbone_agree(tmp_path):
    """Two fresh towers: the denoiser without conditioning is the backbone, so mock-AR is AR."""
    from convert import convert

    convert(golden_of("backbone-0").model_folder, tmp_path / "two", two_towers=True)
    model = tt.load(tmp_path / "two", dtype="float32")
    prompts = golden_of("backbone-0").prompts
    assert model.generate_mock_ar(prompts, 24).tokens == model.generate_ar(prompts, 24).tokens
    assert model.generate_mask_diffusion(prompts, 16).errors == [None] * 4


# Measured (median over all logits of |bfloat16 - float32|, logits of standard deviation 3 to 4): trained-0 0.006,
# tiny-0 0.029, grouped-0 0.040, backbone-0 0.145. Tails are long: an expert chosen differently moves a whole position.
BFLOAT16_MEDIAN = {"trained-0": 0.01, "tiny-0": 0.05, "grouped-0": 0.06, "backbone-0": 0.2}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "grouped-0" else ()) for name in BFLOAT16_MEDIAN]
)
def test_bfloat16_logits(name, task_prompts):
    half, full = load(name, "bfloat16"), load(name)
    assert half.params["context"]["head"].dtype == jnp.bfloat16
    if name == "trained-0":
        prompts = [byte_ids(p["prompt"] + p["answer"]) for p in task_prompts[:20]]
    else:
        prompts = golden_of(name).prompts
    differences = [np.abs(half.context_logits(ids) - full.context_logits(ids)).ravel() for ids in prompts]
    assert np.median(np.concatenate(differences)) < BFLOAT16_MEDIAN[name]


@pytest.mark.parametrize(
    "name", ["tiny-0", "backbone-0", *(pytest.param(n, marks=pytest.mark.slow) for n in ("grouped-0", "trained-0"))]
)
def test_bfloat16_long_prompt_is_finite(name):
    model = load(name, "bfloat16")
    ids = np.random.default_rng(0).integers(4, model.config.vocab_size, 4096)
    assert np.isfinite(model.context_logits(ids)).all()
    if model.two_towers:
        assert model.generate_mask_diffusion([ids], 32).errors == [None]


def test_programs_are_shared():
    """Another threshold, step count, seed or EOS, or a prompt of about the same length, compiles nothing."""
    model = load("tiny-0")
    model.generate_mask_diffusion([[5, 6, 7]], 20, temperature=0.5, eos_token_id=9)
    g = model.generate_mask_diffusion(
        [[5, 6, 7, 8]], 31, steps_per_block=4, confidence_threshold=0.1, temperature=0.9, eos_token_id=11, seed=4
    )
    assert g.compile_seconds == 0


def test_bucket():
    lengths = np.arange(1, 5000)
    buckets = np.array([bucket(int(n)) for n in lengths])
    assert (buckets >= lengths).all()
    assert (buckets[63:] <= 1.25 * lengths[63:]).all()
    assert len(set(buckets)) < 60


BAD = [
    ({"prompts": [[]]}, "prompt 0 is empty"),
    ({"prompts": [[1, 2], []]}, "prompt 1 is empty"),
    ({"prompts": [[1, 128]]}, "prompt 0 has id 128 at position 1; ids go from 0 to 127"),
    ({"prompts": [[-1]]}, "id -1 at position 0"),
    ({"prompts": [1, 2]}, "for one prompt give"),
    ({"prompts": jnp.array([1, 2])}, "for one prompt give"),
    ({"prompts": [None]}, "prompt 0 must be a list of token ids, not None"),
    ({"prompts": {"a": 1}}, "prompt 0 must be a list of token ids, not 'a'"),
    ({"prompts": "text"}, "must be a list of token-id lists"),
    ({"prompts": ["text"]}, "prompt 0 must be a list of token ids"),
    ({"prompts": [[1.5]]}, "whole numbers"),
    ({"prompts": [[[1]]]}, "flat list"),
    ({"prompts": [[1, [2]]]}, "flat list"),
    ({"max_new_tokens": -1}, "max_new_tokens must be from 0 to"),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
    ({"block_size": 0}, "block_size must be"),
    ({"steps_per_block": 0}, "steps_per_block must be"),
    ({"confidence_threshold": 1.1}, "confidence_threshold must be"),
    ({"confidence_threshold": -0.1}, "confidence_threshold must be"),
    ({"confidence_threshold": float("nan")}, "confidence_threshold must be"),
    ({"temperature": -1}, "temperature must be"),
    ({"temperature": float("inf")}, "temperature must be"),
    ({"mask_token_id": 128}, "mask_token_id must be from 0 to 127"),
    ({"eos_token_id": 500}, "eos_token_id must be from 0 to 127"),
    ({"eos_token_id": "x"}, "eos_token_id must be"),
    ({"top_k": 0}, "top_k must be 1 or more"),
    ({"seed": -1}, "seed must be"),
    ({"rows": [0, 1]}, "a number for each of 1 prompts"),
    ({"rows": 5}, "rows must be a list of whole numbers"),
    ({"eos_token_id": 1.5}, "eos_token_id must be a whole number"),
    ({"eos_token_id": dict}, "eos_token_id must be a whole number"),
    ({"temperature": 10**400}, "temperature must be a number"),
    ({"temperature": "0"}, "temperature must be a number"),
    ({"top_k": True}, "top_k must be a whole number"),
    ({"prompts": [[2**70]]}, "prompt 0 has id 1180591620717411303424 at position 0"),
    ({"prompts": [[2**63]]}, "prompt 0 has id 9223372036854775808"),
    ({"max_new_tokens": 10**7}, "not one row fits: .* GB a row of 10485760 positions, 0.9 GB of a device to use"),
    ({"max_new_tokens": 10**15}, "max_new_tokens must be from 0 to 1073741824"),
    ({"max_new_tokens": 10**400}, "max_new_tokens must be from 0 to 1073741824"),
    ({"max_new_tokens": 2**30}, "not one row fits"),
    ({"prompts": np.array(5)}, "must be a list of token-id lists"),
    ({"prompts": jnp.array(5)}, "must be a list of token-id lists"),
    ({"prompts": [jax.random.split(jax.random.key(0), 2)]}, "flat list of whole numbers"),
    ({"prompts": [{1, 2}]}, "prompt 0 must be a list of token ids"),
    ({"prompts": [[1, True]]}, "whole numbers"),
    ({"block_size": 10**9}, "block_size must be from 1 to 65536"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input(tiny, arguments, message, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    with pytest.raises(tt.InputError, match=message.replace("(", r"\(")) as error:
        tiny.model.generate_mask_diffusion(**{"prompts": [[1]]} | arguments)
    assert "\n" not in str(error.value)


def test_scalars_of_arrays_will_do(tiny):
    plain = tiny.model.generate_ar([[5, 6]], 16, eos_token_id=9, temperature=0.5, rows=[3], seed=2)
    arrays = tiny.model.generate_ar(
        jnp.array([[5, 6]]),
        np.int64(16),
        eos_token_id=jnp.array(9),
        temperature=jnp.float32(0.5),
        rows=jnp.array([3]),
        seed=np.array(2),
    )
    assert arrays.tokens == plain.tokens
    assert tiny.model.generate_ar([[5, 6]], 16, eos_token_id=np.array([9, 10])).errors == [None]


def test_bad_top_p(tiny):
    for top_p in (0, 1.5):
        with pytest.raises(tt.InputError, match="top_p must be a number, above 0 and at most 1"):
            tiny.model.generate_ar([[1]], temperature=1.0, top_p=top_p)


def test_prompt_longer_than_memory(tiny, monkeypatch):
    """Says how much it would take, before anything is compiled and after."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3_000_000)
    with pytest.raises(tt.InputError, match=r"not one row fits: .* GB a row of 20480 positions, 0.0027 GB"):
        tiny.model.generate_ar([[5] * 20_000])
    with pytest.raises(tt.InputError, match=r"a prompt of 2000 tokens .* would take .* GB"):
        tiny.model.context_logits([5] * 2_000)


def test_backbone_has_no_denoiser():
    model = load("backbone-0")
    assert not model.two_towers
    for mode in ("generate_mask_diffusion", "generate_mock_ar"):
        with pytest.raises(tt.InputError, match=f"{mode} needs a denoiser"):
            getattr(model, mode)([[1]])


@pytest.mark.parametrize("dtype", ["float16", "double", jnp.int32, None])
def test_bad_dtype(dtype):
    with pytest.raises(tt.InputError, match="choose float32 or bfloat16"):
        tt.load("demo", dtype=dtype)


def test_model_larger_than_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(tt.InputError, match=r"demo in bfloat16 would take 0.0109 GB; .* has 0.001 GB free"):
        tt.load("demo")


def test_dtype_objects():
    assert load("tiny-0", jnp.float32).params["context"]["head"].dtype == jnp.float32


def test_top_p_of_everything_restricts_nothing(tiny):
    """1 is no restriction, whatever a float32 sum of probabilities comes to: it runs the program without one."""
    options = {"max_new_tokens": 8, "temperature": 1.0}
    plain = tiny.model.generate_ar([[5, 6]], **options)
    whole = tiny.model.generate_ar([[5, 6]], top_p=1.0, **options)
    assert whole.tokens == plain.tokens
    assert whole.compile_seconds == 0


def test_a_gpu_that_is_short_names_its_setting():
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 10**9, "bytes_in_use": 0})
    with pytest.raises(tt.InputError, match=r"has 1 GB free .*XLA_PYTHON_CLIENT_MEM_FRACTION"):
        memory.require(2 * 10**9, device, "a model")
    memory.require(10**9, device, "a model")
