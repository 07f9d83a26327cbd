"""HiddenStates of a wrapped model: the same rows, by index and by the names of the model and of the wrapper."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_models import make_batch, make_model, transformers

from alpkd_fast.capture import HiddenStates

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    rendezvous = tmp_path_factory.mktemp("wrapped") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp1(model):
    policy = ModuleWrapPolicy({transformers.models.bert.modeling_bert.BertLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))


def compiled(model):
    return torch.compile(DistributedDataParallel(model), backend="eager")


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp1": fsdp1, "compiled-ddp": compiled}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("layers", [None, [0, -1], ["encoder.layer.0"], "wrapper's"], ids=str)
def test_blocks_are_found(wrap, layers):
    model, batch = make_model("bert"), make_batch()
    wanted = model(**batch, output_hidden_states=True).hidden_states[1:]
    wanted = wanted if layers is None else [wanted[0], wanted[-1]] if layers == [0, -1] else [wanted[0]]
    wrapped = wrap(model)
    if layers == "wrapper's":
        layers = [next(name for name, _ in wrapped.named_modules() if name.endswith("encoder.layer.0"))]
        assert layers != ["encoder.layer.0"]
    with HiddenStates(wrapped, layers, "cls") as capture:
        wrapped(**batch)
    for got, want in zip(capture.take(), wanted, strict=True):
        torch.testing.assert_close(got, want[:, 0])
