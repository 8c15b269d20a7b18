"""One thread a process: the models are tiny, and several test processes share the cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

pytest_plugins = ["tests.helpers.sglang"]
