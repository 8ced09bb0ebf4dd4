"""Reading a program's text: lines as XLA for GPUs, TPUs and CPUs writes them."""

from twotower_jax.compiled_text import collectives, copies

TEXT = """
HloModule jit_f, is_scheduled=true

%fused_computation.1 (param_0: bf16[16,8]) -> f32[16,8] {
  %param_0 = bf16[16,8]{1,0} parameter(0)
  ROOT %convert.1 = f32[16,8]{1,0} convert(%param_0)
}

%wrapped_gather (p: f32[4]) -> f32[32] {
  %p = f32[4]{0} parameter(0)
  ROOT %all-gather.9 = f32[32]{0} all-gather(%p), dimensions={0}
}

ENTRY %main (weights: bf16[16,8], x: f32[4]) -> f32[16,8] {
  %weights = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[4]{0} parameter(1)
  %copy.1 = bf16[16,8]{0,1:T(8,128)(2,1)} copy(%weights)
  %fusion.1 = f32[16,8]{1,0} fusion(%copy.1), kind=kLoop, calls=%fused_computation.1
  %bitcast.1 = bf16[8,16]{1,0} bitcast(%copy.1)
  %slow = ((f32[4]{0}), f32[32]{0:T(256)}, u32[]) async-start(%x), calls=%wrapped_gather
  %sum = (f32[4]{0}, f32[100]{0}) all-reduce-start(%x, %y), to_apply=%add
  %sum.done = (f32[4]{0}, f32[100]{0}) all-reduce-done(%sum)
  %part = ((f32[64]{0:T(256)}, f32[8]{0}), (f32[8]{0:T(256)}, f32[1]{0})) reduce-scatter-start(%x, %y), to_apply=%add
  %next = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %fetched = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} copy(%weights)
  %some = ((bf16[16,8]{1,0:T(8,128)}), bf16[4,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%weights), slice={}
  %ahead = (bf16[16,8]{1,0:T(8,128)S(1)}, bf16[16,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%weights)
  %both = (f32[4]{0}, s32[2,2]{1,0}) all-to-all(%x, %x), dimensions={0}
  ROOT %out = f32[16,8]{1,0} add(%fusion.1, %fusion.1)
}
"""


def test_collectives():
    """What they give: a start's result has its operands too, but for sums."""
    expected = {"all-gather": (1, 128), "all-reduce": (1, 416), "all-to-all": (1, 32)}
    assert collectives(TEXT) == expected | {"reduce-scatter": (1, 36), "collective-permute": (1, 16)}


def test_copies():
    """What copies and fusions give, of one matrix or several; not parameters, views, or what stays inside a fusion."""
    assert copies(TEXT, 16, 8) == ["copy bf16[16,8]", "fusion f32[16,8]", "add f32[16,8]"]
    assert copies(TEXT, 8, 4) == ["copy bf16[16,8]", "fusion f32[16,8]", "add f32[16,8]"]  # of four
    assert copies(TEXT, 16, 3) == copies(TEXT, 128, 1) == []
