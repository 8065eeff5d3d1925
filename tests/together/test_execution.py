"""A request carried out without a terminal, as a server does it: everything that happens is an event, the end an `Outcome`."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import tpuvid
from shared.pipes import kept
from tpuvid import CancelToken
from tpuvid.contract.events import Noticed, Progressed, Reached, Stopped, VideoFailed, VideoMade
from tpuvid.contract.options import Options
from tpuvid.runs.asked.requests import Keeping, plan_generation
from tpuvid.runs.execution import Execution
from tpuvid.runs.pipeline import Pipeline

SMALL = {"num_frames": 5, "num_inference_steps": 4, "height": 64, "width": 64}


@pytest.fixture
def execute(tmp_path):
    def execute(*prompts, emit=None, cancel=None):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        request = plan_generation(
            "wan-tiny", prompt=None, prompts=str(tmp_path / "prompts.txt"), num_videos=1, sweep=(), settings=SMALL,
            options=Options(), keeping=Keeping(output_dir=tmp_path / "out"),
        )  # fmt: skip
        events = []
        execution = Execution(
            request=request, load=partial(kept, "wan-tiny"), emit=emit or events.append, cancel=cancel or CancelToken()
        )
        return execution.run(), events

    return execute


def kinds(events, kind):
    return [event for event in events if isinstance(event, kind)]


def test_what_is_made_is_told_and_nothing_is_printed(execute, capfd):
    outcome, events = execute("a red circle", "a blue square")
    assert (outcome.made, outcome.there, outcome.failed, outcome.stopped) == (2, 0, 0, None)
    made = kinds(events, VideoMade)
    assert tuple(event.files["video"] for event in made) == outcome.videos and all(path.exists() for path in outcome.videos)
    assert [event.record["prompt"] for event in made] == ["a red circle", "a blue square"] and made[0].frames == 5
    assert [(e.what, e.number, e.total) for e in kinds(events, Reached) if e.what == "decoding"] == [
        ("decoding", 1, 2),
        ("decoding", 2, 2),
    ]
    steps = [event for event in kinds(events, Progressed) if event.what == "denoise" and event.seconds is None]
    assert [event.done for event in steps] == [0, 1, 2, 3, 4] * 2 and {event.total for event in steps} == {4}
    assert capfd.readouterr() == ("", "")
    again, events = execute("a red circle", "a blue square")
    assert (again.made, again.there) == (0, 2) and events == []


def test_a_failure_is_an_event_and_the_others_go_on(execute, monkeypatch):
    encode = Pipeline.encode_config

    def fail_at_blue(self, config, **how):
        if "blue" in config.prompt:
            raise RuntimeError("no room")
        return encode(self, config, **how)

    monkeypatch.setattr(Pipeline, "encode_config", fail_at_blue)
    outcome, events = execute("a red circle", "a blue square")
    (failed,) = kinds(events, VideoFailed)
    assert (outcome.made, outcome.failed) == (1, 1) and "no room" in failed.error and failed.prompt == "a blue square"
    assert "line 2" in failed.where and not failed.video.exists()


def test_a_stop_is_an_outcome_that_says_how_far_it_came(execute):
    cancel = CancelToken()

    def emit(event):
        if isinstance(event, Progressed) and event.what == "denoise" and event.done == 2:
            cancel.cancel()

    outcome, _ = execute("a red circle", emit=emit, cancel=cancel)
    assert outcome.stopped == Stopped(done=2, total=4, kept=True, terminated=False)
    outcome, events = execute("a red circle")
    assert outcome.made == 1 and kinds(events, VideoMade)[0].record["history"]["denoise"]["resumed"] == "after step 2"
    assert not kinds(events, Noticed)


def test_a_run_that_failed_leaves_nothing_in_the_next_record():
    pipe = kept("wan-tiny")

    def stop(done, total):
        if done == 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        pipe.generate("a red circle", window_size="frames=1", on_step=stop, **SMALL)
    history = pipe.generate("a red circle", **SMALL).history
    assert not any("window" in about for about in history.values()) and "denoise" not in history["encode"]["seconds"]


def test_pipelines_in_threads_open_and_trace_at_once():
    """Other sizes in each, none of which was traced before; stages are opened meanwhile."""
    sizes = [32, 48, 80]

    def make(height):
        return tpuvid.load("wan-tiny").generate("a red circle", **SMALL | {"height": height, "num_inference_steps": 2}).frames

    with ThreadPoolExecutor(4) as threads:
        opened = threads.submit(lambda: [tpuvid.load("wan-tiny").verify() for _ in range(4)])
        found = list(threads.map(make, sizes))
        opened.result(timeout=300)
    for height, frames in zip(sizes, found, strict=True):
        assert frames.shape == (1, 5, height, 64, 3) and np.array_equal(frames, make(height))
