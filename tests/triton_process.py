"""Running Triton kernels in a process of their own: triton reads TRITON_INTERPRET when imported."""

import json
import os
import subprocess
import sys
from typing import Any

import torch


def answers_of(script: str) -> dict[str, Any]:
    """What ``script`` prints as JSON: interpreted, or on the GPU where there is one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
