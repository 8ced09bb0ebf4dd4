"""Reading a program's text: lines as XLA for GPUs, TPUs and CPUs writes them."""

from twotower_jax.compiled_text import collectives, new_arrays

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
  %sum = (f32[4]{0}, f32[4]{0}) all-reduce-start(%x), to_apply=%add
  %sum.done = f32[4]{0} all-reduce-done(%sum)
  %both = (f32[4]{0}, s32[2,2]{1,0}) all-to-all(%x, %x), dimensions={0}
  ROOT %out = f32[16,8]{1,0} add(%fusion.1, %fusion.1)
}
"""


def test_collectives():
    assert collectives(TEXT) == {"all-gather": (1, 128), "all-reduce": (1, 16), "all-to-all": (1, 32)}


def test_new_arrays():
    """Copies and what fusions give; not parameters, other views, or what stays inside a fusion."""
    assert new_arrays(TEXT, {128}) == ["copy bf16[16,8]", "fusion f32[16,8]", "add f32[16,8]"]
    assert new_arrays(TEXT, {64}) == []
