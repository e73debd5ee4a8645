"""Inductor compiles in the process of the test: a pool of others would import torch first."""

import os

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
