"""int8 with scales, by hand and by its error bound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feature_store import packing


def round_trip(features, dtype=np.float32):
    out = np.empty(features.shape, dtype)
    packing.unpack(packing.pack(features), out)
    return out


def test_codes_and_scales_are_those_computed_by_hand():
    token = np.array([127.0, -63.5, 1.0, 0.4])
    assert packing.pack(token).tolist() == [127, -64, 1, 0, *np.float16([1.0]).view(np.int8)]
    assert round_trip(token).tolist() == [127, -64, 1, 0]


def test_each_group_of_64_channels_has_its_own_scale():
    token = np.concatenate([np.full(64, 1000.0), np.full(6, 0.001)])
    stored = packing.pack(token)
    assert len(stored) == 70 + 2 * 2 == packing.stored_channels(70, "int8")
    assert np.allclose(round_trip(token), token, rtol=1e-3)


def test_zeros_stay_zeros():
    assert not round_trip(np.zeros((2, 3, 100), np.float16)).any()


def test_values_beyond_a_float16_scale_are_refused():
    with pytest.raises(OverflowError):
        packing.pack(np.full(64, 1e7))


values = hnp.arrays(np.float32, (3, 70), elements=st.floats(-1000, 1000, width=32))


@given(values)
def test_the_error_is_at_most_half_a_step(features):
    largest = np.stack([np.abs(features[:, :64]).max(1), np.abs(features[:, 64:]).max(1)], 1)
    step = np.repeat(largest / 127, [64, 6], axis=1)
    # A scale is rounded to float16: by 2**-11 of itself, or by half of the smallest subnormal.
    slack = 127 * (step * 2**-11 + 2**-25)
    assert (np.abs(round_trip(features) - features) <= step / 2 + slack * 1.01).all()


@given(values)
def test_packing_what_was_unpacked_changes_little_more(features):
    once = round_trip(features)
    assert np.allclose(round_trip(once), once, atol=np.abs(features).max() / 100 + 1e-6)
