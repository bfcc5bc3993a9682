import json

import pytest

from relic.nn.student import FewSteps, StudentConfig
from relic.ops.retention import Compressed, Full, SinkWindow, Window
from tests.worlds import NANO, NANO_CLIP, NANO_WORDS


@pytest.mark.parametrize(
    "policy", [Full(), Window(latents=4), SinkWindow(sink=1, window=4), Compressed(window=4, schedule=(1, 2))]
)
@pytest.mark.parametrize("words", [NANO_WORDS, None])
def test_a_student_is_rebuilt_from_its_header(policy, words):
    config = StudentConfig(
        net=NANO, words=words, clip=NANO_CLIP, policy=policy, sampler=FewSteps(steps=2, context="last_step")
    )
    assert StudentConfig.from_header(json.loads(json.dumps(config.to_header()))) == config


def test_the_plan_covers_the_longest_horizon():
    config = StudentConfig(net=NANO, words=None, clip=NANO_CLIP, policy=Window(latents=2), sampler=FewSteps())
    assert config.plan().num_latents == 3
    assert config.plan(endless=True).num_latents is None


def test_a_policy_of_another_version_is_named():
    values = StudentConfig(
        net=NANO, words=None, clip=NANO_CLIP, policy=Full(), sampler=FewSteps()
    ).to_header()
    values["policy"] = {"kind": "dreams"}
    with pytest.raises(ValueError, match="'dreams' is unknown; known are full, window"):
        StudentConfig.from_header(values)
