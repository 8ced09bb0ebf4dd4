"""The model's dimensions, read from a Hugging Face `config.json` and checked.

Dimension letters, used in every einsum and docstring of the package:
B rows, L new positions, T cached positions, D hidden, V vocabulary, S block size; Mamba-2: H heads, P head dim,
N state, G groups, K convolution taps, C convolution channels (H P + 2 G N), Q chunk; attention: H query heads,
J key/value heads, R = H/J, P head dim; experts: E experts, F expert width.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower_jax.errors import InputError, short

TWO_TOWER_ARCHITECTURE = "NemotronHTwoTowerForCausalLM"
BACKBONE_ARCHITECTURE = "NemotronHForCausalLM"

MAMBA, ATTENTION, MOE, MLP = "M*E-"

# transformers >= 5.20 writes a list of these instead of the pattern; earlier 5.x used the two short names.
LAYER_TYPES = {
    "linear_attention": MAMBA,
    "mamba": MAMBA,
    "full_attention": ATTENTION,
    "attention": ATTENTION,
    "moe": MOE,
    "mlp": MLP,
}

# Options of the NemotronH family that no TwoTower uses: any other value would be another model.
FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "tie_word_embeddings": False,
    "sliding_window": None,
    "moe_latent_size": None,
    "n_shared_experts": 1,
    "residual_in_fp32": False,
}


@dataclasses.dataclass(frozen=True)
class Shards:
    """Over how many devices rows, experts, and what tensor parallelism divides are divided (see `sharding`)."""

    data: int = 1
    expert: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Dimensions and constants of one tower; both towers of a model share them.

    Inside a program over several devices they are those of what one device holds (`sharding.share`); of what is
    `whole` there, `shards` tells how it is divided.
    """

    pattern: str  # a letter a layer: M Mamba-2, * attention, E mixture of experts, - dense MLP
    vocab_size: int
    hidden_size: int
    norm_eps: float

    mamba_heads: int
    mamba_head_dim: int
    state_size: int
    mamba_groups: int
    conv_kernel: int
    conv_bias: bool
    chunk_size: int
    time_step_limit: tuple[float, float]
    time_step_init: tuple[float, float, float]  # smallest, largest, floor

    attention_heads: int
    kv_heads: int
    head_dim: int

    experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int
    expert_groups: int
    expert_groups_kept: int
    routed_scale: float
    normalize_weights: bool

    mlp_width: int

    initializer_range: float
    eos_token_ids: tuple[int, ...]

    expert_form: str | None = None  # of `EXPERT_BITS`, where the routed experts are quantised (`layers.quantized`)

    shards: Shards = Shards()
    whole: "Config | None" = None

    @property
    def mamba_width(self) -> int:
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        return self.mamba_width + 2 * self.mamba_groups * self.state_size

    @property
    def expert_bits(self) -> int | None:
        """Of a number of quantised experts."""
        return EXPERT_BITS[self.expert_form] if self.expert_form else None

    @property
    def expert_group(self) -> int | None:
        """How many numbers of a row of a quantised expert have a scale in common: all of 8 bits; of 4 the largest
        multiple of 8, up to 64, that divides half a row. None if the experts are not, or cannot be, quantised so.
        """
        if self.expert_bits == 8:
            return self.hidden_size
        sizes = range(64, 0, -8) if self.expert_bits == 4 else ()
        return next((size for size in sizes if self.hidden_size % (2 * size) == 0), None)

    def shape(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        """Sizes of logical axes (see `parameters.Parameter.axes`)."""
        sizes = {
            "layers": len(self.pattern),
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "mamba_in": self.mamba_width + self.conv_channels + self.mamba_heads,
            "mamba_inner": self.mamba_width,
            "mamba_heads": self.mamba_heads,
            "conv_taps": self.conv_kernel,
            "conv_channels": self.conv_channels,
            "query": self.attention_heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "experts": self.experts // self.shards.expert,
            "routes": self.experts,
            "expert_width": self.expert_width,
            "expert_row": self.hidden_size * (self.expert_bits or 0) // 8,
            "expert_scales": self.hidden_size // (self.expert_group or self.hidden_size),
            "shared_width": self.shared_width,
            "mlp_width": self.mlp_width,
            "time_features": TIME_FEATURES,
            "modulation": 3,
            "modulation_hidden": 3 * self.hidden_size,
        }
        return tuple(sizes[axis] for axis in axes)


EXPERT_BITS = {"int8": 8, "int4": 4}


def with_quantized_experts(config: Config, form: str) -> Config:
    """The config of the same model with experts in one of the forms `EXPERT_BITS`.

    Raises:
      InputError: there is no such form, or the model's experts cannot have it.
    """
    if not isinstance(form, str) or form not in EXPERT_BITS:
        raise InputError(f"experts {short(form)} do not exist here; choose {' or '.join(EXPERT_BITS)}")
    if MOE not in config.pattern:
        raise InputError(f"experts {form}: this model, {config.pattern}, has no experts")
    made = dataclasses.replace(config, expert_form=form)
    if made.expert_group is None:
        raise InputError(f"experts {form}: hidden_size {config.hidden_size} is no multiple of 16; int8 takes any")
    return made


def quantization(config: Config) -> dict[str, Any]:
    """What `config.json` says of quantised experts; nothing of others."""
    if config.expert_form is None:
        return {}
    said = {"quant_method": "twotower_jax", "experts": config.expert_form, "group_size": config.expert_group}
    return {"quantization_config": said}


def _quantized(config: Config, raw: Mapping[str, Any]) -> Config:
    """The config, with experts as `config.json` says that they are."""
    said = raw.get("quantization_config")
    if said is None:
        return config
    if not isinstance(said, Mapping) or said.get("quant_method") != "twotower_jax":
        raise InputError(f"config.json: quantization_config {short(said)} is not of twotower convert --experts")
    config = with_quantized_experts(config, said.get("experts"))
    right = quantization(config)["quantization_config"]
    if said != right:
        raise InputError(f"config.json: quantization_config must be {right}; convert the model's source again")
    return config


TIME_FEATURES = 256  # width of the sinusoid of t; not in any config


def read_json(path: Path) -> Any:
    """The contents of a JSON file; a bare `Infinity`, as older Hugging Face files have it, is let pass.

    Raises:
      InputError: the file is absent, unreadable, not text or not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        return json.loads(text, object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise InputError(f"{path.parent} is no model folder: it has no {path.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that stands twice `json` would keep the last, silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(key for key, _ in pairs)}"[:300])
    return found


def _special_float(value: Any) -> Any:
    """Newer Hugging Face files write infinity as `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping) and value.keys() == {"__float__"}:
        try:
            return float(value["__float__"])
        except (TypeError, ValueError):
            return value
    return value


def layer_pattern(raw: Mapping[str, Any]) -> str:
    """The layers as letters, from `hybrid_override_pattern` or from `layers_block_type`."""
    types = raw.get("layers_block_type") or raw.get("layer_types")
    pattern = raw.get("hybrid_override_pattern")
    if pattern is None and types is None:
        raise InputError("config.json: neither hybrid_override_pattern nor layers_block_type is given")
    if types is not None:
        for kind in types if isinstance(types, list) else [types]:
            if not isinstance(kind, str) or kind not in LAYER_TYPES or kind is types:
                raise InputError(f"config.json: unknown layer type {kind!r}; known are {', '.join(LAYER_TYPES)}")
        letters = "".join(LAYER_TYPES[kind] for kind in types)
        if pattern is not None and pattern != letters:
            raise InputError(
                f"config.json: hybrid_override_pattern {pattern!r} is not its list of layer types, {letters!r}"
            )
        pattern = letters
    if not isinstance(pattern, str) or not pattern:
        raise InputError(f"config.json: hybrid_override_pattern must be a text of layer letters, not {pattern!r}")
    for index, letter in enumerate(pattern):
        if letter not in (MAMBA, ATTENTION, MOE, MLP):
            raise InputError(
                f"config.json: unknown layer letter {letter!r} at layer {index} of {pattern!r}; known are "
                "M (Mamba-2), * (attention), E (experts), - (MLP)"
            )
    layers = raw.get("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        raise InputError(f"config.json: num_hidden_layers is {layers!r}, but {pattern!r} has {len(pattern)} layers")
    return pattern


def as_two_towers(raw: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The `config.json` of two towers made of a backbone: in the older form, the only one that NVIDIA's code reads."""
    newer = ("layers_block_type", "layer_types")
    return {name: value for name, value in raw.items() if name not in newer} | {
        "architectures": [TWO_TOWER_ARCHITECTURE],
        "hybrid_override_pattern": config.pattern,
        "num_hidden_layers": len(config.pattern),
        "time_step_limit": list(config.time_step_limit),
    }


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


class _Reader:
    """Typed access to a raw config; a field that the pattern does not need may be absent."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw

    def integer(self, name: str, needed: bool = True, default: int | None = None) -> int:
        value = self.raw.get(name, default)
        if value is None and not needed:
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or (needed and value < 1):
            raise InputError(f"config.json: {name} must be a whole number of 1 or more, not {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name, default)
        if not _is_number(value):
            raise InputError(f"config.json: {name} must be a number, not {value!r}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"config.json: {name} must be true or false, not {value!r}")
        return value


def parse_config(raw: Any) -> Config:
    """A checked `Config` from the contents of a Hugging Face `config.json`.

    Raises:
      InputError: a field is missing, of the wrong type, in conflict with another, or asks for another model.
    """
    if not isinstance(raw, Mapping):
        raise InputError(f"config.json must hold an object, not {type(raw).__name__}")
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise InputError(f"config.json: architectures must be a list of names, not {architectures!r}")
    for kind in (raw.get("model_type") or "nemotron_h", *architectures):
        if not str(kind).lower().replace("_", "").startswith("nemotronh"):
            raise InputError(f"config.json is of {kind!r}, not of a NemotronH: neither a TwoTower nor its backbone")
    for name, only in FIXED.items():
        if raw.get(name, only) != only:
            raise InputError(f"config.json: {name} is {raw[name]!r}; only {only!r} is a Nemotron-TwoTower")
    pattern = layer_pattern(raw)
    read = _Reader(raw)
    mamba, attention, moe, mlp = (letter in pattern for letter in (MAMBA, ATTENTION, MOE, MLP))
    limit = raw.get("time_step_limit", [0.0, math.inf])
    limit = [_special_float(x) for x in limit] if isinstance(limit, list) else limit
    if not (isinstance(limit, list) and len(limit) == 2 and all(map(_is_number, limit))):
        raise InputError(f"config.json: time_step_limit must be [smallest, largest], not {limit!r}")
    eos = raw.get("eos_token_id")
    eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    vocab = read.integer("vocab_size")
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab for token in eos):
        raise InputError(
            f"config.json: eos_token_id must be an id from 0 to {vocab - 1} or a list of them, "
            f"not {raw['eos_token_id']!r}"
        )
    config = Config(
        pattern=pattern,
        vocab_size=vocab,
        hidden_size=read.integer("hidden_size"),
        norm_eps=read.number("layer_norm_epsilon", read.number("norm_eps", 1e-5)),
        mamba_heads=read.integer("mamba_num_heads", mamba),
        mamba_head_dim=read.integer("mamba_head_dim", mamba),
        state_size=read.integer("ssm_state_size", mamba),
        mamba_groups=read.integer("n_groups", mamba),
        conv_kernel=read.integer("conv_kernel", mamba),
        conv_bias=read.boolean("use_conv_bias", True),
        chunk_size=read.integer("chunk_size", mamba, default=128),
        time_step_limit=(float(limit[0]), float(limit[1])),
        time_step_init=(
            read.number("time_step_min", 1e-3),
            read.number("time_step_max", 0.1),
            read.number("time_step_floor", 1e-4),
        ),
        attention_heads=read.integer("num_attention_heads", attention),
        kv_heads=read.integer("num_key_value_heads", attention),
        head_dim=read.integer("head_dim", attention),
        experts=read.integer("n_routed_experts", moe),
        experts_per_token=read.integer("num_experts_per_tok", moe),
        expert_width=read.integer("moe_intermediate_size", moe),
        shared_width=read.integer("moe_shared_expert_intermediate_size", moe),
        expert_groups=read.integer("n_group", moe, default=1),
        expert_groups_kept=read.integer("topk_group", moe, default=1),
        routed_scale=read.number("routed_scaling_factor", 1.0),
        normalize_weights=read.boolean("norm_topk_prob", True),
        mlp_width=read.integer("intermediate_size", mlp),
        initializer_range=read.number("initializer_range", 0.02),
        eos_token_ids=eos,
    )
    _check(config, raw, mamba, attention, moe)
    return _quantized(config, raw)


def _check(c: Config, raw: Mapping[str, Any], mamba: bool, attention: bool, moe: bool) -> None:
    """The relations between fields that the layers rely on."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise InputError(f"config.json: {message}")

    epsilons = {raw[name] for name in ("layer_norm_epsilon", "norm_eps") if name in raw}
    require(
        len(epsilons) < 2,
        f"layer_norm_epsilon {raw.get('layer_norm_epsilon')} and norm_eps {raw.get('norm_eps')} differ",
    )
    require(c.norm_eps > 0, f"the norm's epsilon must be above 0, not {c.norm_eps}")
    require(c.time_step_limit[0] <= c.time_step_limit[1], f"time_step_limit {list(c.time_step_limit)} is empty")
    if mamba:
        require(
            c.mamba_heads % c.mamba_groups == 0,
            f"n_groups {c.mamba_groups} does not divide mamba_num_heads {c.mamba_heads}",
        )
    if attention:
        require(
            c.attention_heads % c.kv_heads == 0,
            f"num_key_value_heads {c.kv_heads} does not divide num_attention_heads {c.attention_heads}",
        )
    if moe:
        require(
            c.experts % c.expert_groups == 0, f"n_group {c.expert_groups} does not divide n_routed_experts {c.experts}"
        )
        require(
            c.expert_groups_kept <= c.expert_groups,
            f"topk_group {c.expert_groups_kept} is more than n_group {c.expert_groups}",
        )
        reachable = c.experts // c.expert_groups * c.expert_groups_kept
        require(
            c.experts_per_token <= reachable,
            f"num_experts_per_tok {c.experts_per_token} is more than the {reachable} experts that routing can reach",
        )
