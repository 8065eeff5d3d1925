import numpy as np
import pytest
from tpuvid import InputError
from tpuvid.compute.step_caches import DeepCache, Uncached, step_cache
from tpuvid.contract import GenerationConfig
from tpuvid.contract.settings import check_sampling
from tpuvid.contract.stepcache import fill_cache_settings, ranges

KNOWN = {"deepcache": DeepCache}


def config(**changes):
    return GenerationConfig(
        height=64, width=64, num_frames=5, fps=8, guidance_scale=5.0, **{"num_inference_steps": 50} | changes
    )


def filled_in(**changes):
    check_sampling(asked := config(**changes))
    return fill_cache_settings(asked, KNOWN)


def test_the_published_schedule():
    """Published for HunyuanVideo: [0, start) ∪ range(start, end, interval) ∪ [end, N), of 50 steps 25 full."""
    full = DeepCache().full_steps(50)
    assert [i for i in range(50) if full[i]] == [*range(11), 11, 15, 19, 23, 27, 31, 35, 39, 43, *range(45, 50)]
    assert sum(full) == 25


@pytest.mark.parametrize("start, end, interval, steps", [(0, 4, 2, 6), (1, 99, 3, 9), (3, 3, 1, 5), (2, 1, 5, 4)])
def test_any_schedule_is_the_formula_and_begins_full(start, end, interval, steps):
    expected = set(range(start)) | set(range(start, end, interval)) | set(range(end, steps))
    full = DeepCache(start, end, interval).full_steps(steps)
    assert {i for i in range(steps) if full[i]} == expected & set(range(steps)) and full[0]


def test_defaults_are_filled_in_and_no_cache_stays_none():
    filled = filled_in(cache="deepcache", cache_start_step=5)
    assert step_cache(filled) == DeepCache(5, 45, 4)
    assert fill_cache_settings(filled, KNOWN) == filled
    plain = filled_in()
    assert plain == config() and isinstance(step_cache(plain), Uncached) and all(step_cache(plain).full_steps(50))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(cache="teacache"), "cache='teacache': choose from deepcache"),
        (dict(cache_start_step=3), "cache_start_step=3: no cache is switched on; add cache=deepcache"),
        (dict(cache="deepcache", cache_step_interval=0), "cache_step_interval=0: needs a whole number ≥ 1"),
        (dict(cache="deepcache", cache_start_step=-1), "cache_start_step=-1: needs a whole number ≥ 0"),
        (dict(cache="deepcache", cache_end_step=2.5), "cache_end_step=2.5: needs a whole number"),
        (dict(cache="deepcache", num_inference_steps=8), "none of 8 steps would be cached; start earlier"),
        (dict(cache="deepcache", cache_step_interval=1), "none of 50 steps would be cached"),
    ],
)
def test_settings_that_do_nothing_or_make_no_sense_are_refused(changes, message):
    with pytest.raises(InputError) as error:
        filled_in(**changes)
    assert message in str(error.value)


def test_ranges_for_people():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""
    full = np.array(DeepCache().full_steps(50))
    assert ranges(np.flatnonzero(full)) == "0-11, 15, 19, 23, 27, 31, 35, 39, 43, 45-49"
