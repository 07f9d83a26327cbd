"""The examples of capturing run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers", reason="the extra [hf] is not installed")
ROOT = Path(__file__).parents[1]


def run(*arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_sequence_parallel():
    out = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/sequence_parallel.py")
    assert len(re.findall(r"^rank [01]: \d+ rows of 60", out, re.MULTILINE)) == 2


@pytest.mark.parametrize("pooling", ["token", "last"])
def test_distill_llama(pooling):
    out = run("examples/distill_llama.py", "--steps", "8", "--pooling", pooling)
    first, last = (float(value) for value in re.findall(r"alp ([\d.]+)", out))
    assert last < first
