"""What of a model that is trained each device holds."""

import math

import jax
import numpy as np
import pytest
from conftest import golden_of

import twotower_jax as tt
from twotower_jax import two_tower
from twotower_jax.parameters import flatten
from twotower_jax.training.sharding import AllDevices


@pytest.mark.parametrize("mesh", [None, {"expert": 8}, {"expert": 2, "tensor": 2}, {"data": 2, "tensor": 4}])
def test_parameters_are_divided(mesh):
    """All but vectors and convolutions lie once over all devices, experts by expert where the mesh says so."""
    config = golden_of("tiny-0").model.config
    devices = AllDevices(jax.devices(), config, mesh, 16, 1)
    for path, p in flatten(two_tower.describe(config, True)):
        value = np.zeros(config.shape(p.axes), np.float32)
        held = devices.put(value, p).addressable_shards[0].data
        if "experts" in p.axes and mesh and "expert" in mesh:
            assert held.shape[p.axes.index("experts")] == config.experts // mesh["expert"]
        if value.ndim > 1 and value.size > 4096:
            assert held.size == value.size // 8, path


def test_rows_that_do_not_divide():
    config = golden_of("tiny-0").model.config
    with pytest.raises(tt.InputError, match=r"4 rows a part .* cannot be split over 8 devices; give a multiple of 8"):
        AllDevices(jax.devices(), config, None, 4, 1)
    with pytest.raises(tt.InputError, match=r"5 rows .* over 4 devices \(data and expert\); give a multiple of 4"):
        AllDevices(jax.devices(), config, {"expert": 2, "tensor": 2}, 5, 1)
    with pytest.raises(tt.InputError, match="mesh expert=3 is of 3 devices, not of 8"):
        AllDevices(jax.devices(), config, {"expert": 3}, 16, 1)
    assert math.prod(AllDevices(jax.devices(), config, {"data": 2, "tensor": 4}, 6, 1).local_rows.shape) == 6
