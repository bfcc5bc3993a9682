import pytest

from tests.suite.runs import played


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a small run, and its records."""
    pytest.importorskip("panda3d")
    root = tmp_path_factory.mktemp("run")
    return root, played(root)
