import json
import sys
from pathlib import Path

import pytest

from relic.suite.vbench import DIMENSIONS, VBenchUnavailable, read_results, run_vbench

RECORDED = {  # in the form that VBench 0.1 writes
    "imaging_quality": [
        0.6612,
        [
            {"video_path": "videos/pan-5s-0.mp4", "video_results": 65.1},
            {"video_path": "videos/loop-5s-0.mp4", "video_results": 67.14},
        ],
    ],
    "dynamic_degree": [1.0, [{"video_path": "videos/pan-5s-0.mp4", "video_results": True}]],
}

STAND_IN = """
import json, pathlib, sys
words = sys.argv[1:]
assert words[0] == "evaluate" and "--mode=custom_input" in words, words
options = dict(zip(words[1:5:2], words[2:6:2])) | {"--output_path": words[-1]}
videos = sorted(pathlib.Path(options["--videos_path"]).glob("*.mp4"))
name = options["--dimension"]
if name == "dynamic_degree":
    print("CUDA out of memory"); sys.exit(0)
value = [0.5, [{"video_path": str(v), "video_results": 0.5} for v in videos]]
out = pathlib.Path(options["--output_path"])
(out / "results_now_eval_results.json").write_text(json.dumps({name: value}))
"""


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "pan-5s-0.mp4").write_bytes(b"")
    return tmp_path / "videos"


def test_a_recorded_result_is_read(tmp_path):
    path = tmp_path / "results_2026_eval_results.json"
    path.write_text(json.dumps(RECORDED))
    assert read_results(path) == {"imaging_quality": 0.6612, "dynamic_degree": 1.0}


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"imaging_quality": 3}', '{"imaging_quality": []}', '{"imaging_quality": [NaN, []]}']
)
def test_what_is_no_result_is_an_error(tmp_path, text):
    path = tmp_path / "r_eval_results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"not a result of VBench|not a finite number"):
        read_results(path)


def test_the_command_is_run_once_a_dimension(tmp_path, videos):
    script = tmp_path / "vbench.py"
    script.write_text(STAND_IN)
    command = (sys.executable, str(script))
    asked = [name for name in DIMENSIONS if name != "dynamic_degree"]
    assert run_vbench(videos, command=command, dimensions=asked) == dict.fromkeys(asked, 0.5)
    with pytest.raises(
        RuntimeError, match=r"no result for dynamic_degree \(exit code 0\).*CUDA out of memory"
    ):
        run_vbench(videos, command=command)


def test_what_cannot_run_is_named(tmp_path, videos):
    with pytest.raises(VBenchUnavailable, match="VBench: not measured, 'no-such-vbench' was not found"):
        run_vbench(videos, command=("no-such-vbench",))
    with pytest.raises(ValueError, match=r"holds no \.mp4"):
        run_vbench(tmp_path, command=(sys.executable,))
    with pytest.raises(ValueError, match="object_class is not among"):
        run_vbench(videos, dimensions=("object_class",))
    blank = tmp_path / "my videos"
    videos.rename(blank)
    with pytest.raises(ValueError, match="holds a blank"):
        run_vbench(Path(blank), command=(sys.executable,))
