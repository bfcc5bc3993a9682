"""Settings for every test: hypothesis tries the same examples on every run, and is never too slow."""

from hypothesis import settings

settings.register_profile("relic", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("relic")
