import subprocess
import sys

import relic.metrics

HEAVY = "{'cv2', 'scipy', 'pycolmap', 'torchvision', 'torchmetrics', 'lpips'}"


def test_importing_metrics_loads_no_heavy_library():
    code = f"import relic.metrics, sys; print(*{HEAVY} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


def test_looking_up_the_odometry_loads_no_opencv():
    code = "from relic.metrics import VisualOdometry; import sys; print('cv2' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == ["False"]


def test_every_public_name_is_there():
    assert all(getattr(relic.metrics, name) is not None for name in relic.metrics.__all__)
