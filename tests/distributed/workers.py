"""What two gloo processes run: a student and its projection in one module, on unequal halves of one batch."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from alpkd_fast import ALPLoss
from alpkd_fast.capture import HiddenStates

WORLD, TOKENS, NARROW, WIDE, LAYERS = 2, 6, 8, 12, 3
LENGTHS = [6, 5, 3, 1, 2]  # rank 0 takes three sequences, rank 1 two
RANKS = [slice(0, 3), slice(3, 5)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(NARROW), nn.Linear(NARROW, NARROW)

    def forward(self, h):
        return h + torch.tanh(self.linear(self.norm(h)))


class Distiller(nn.Module):
    """Student and criterion in one module, so that DDP and FSDP see the parameters of both."""

    def __init__(self, pooling, projection):
        super().__init__()
        self.student = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.criterion = ALPLoss(NARROW, WIDE, projection=projection, learn_scale=True)
        self.pooling = pooling

    def forward(self, x, teacher_rows, mask, normalizer):
        names = [name for name, _ in self.student.named_children()]
        with HiddenStates(self.student, names, self.pooling, mask) as s:
            self.student(x)
            return self.criterion(s.take(), teacher_rows, s.row_weights, normalizer=normalizer)


def make(pooling, projection):
    torch.manual_seed(0)
    return Distiller(pooling, projection)


def global_batch(pooling, empty_rank):
    """x (5, 6, NARROW), the teacher's rows, the mask and the count of rows that count."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(LENGTHS), TOKENS, NARROW, generator=generator)
    mask = (torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]).long()
    if empty_rank is not None:
        mask[RANKS[empty_rank]] = 0
    states = [torch.randn(len(LENGTHS), TOKENS, WIDE, generator=generator) for _ in range(4)]
    if pooling == "mean":
        share = mask / mask.sum(-1, keepdim=True).clamp_min(1)
        states = [torch.einsum("bs,bsd->bd", share, t) for t in states]
    elif pooling == "cls":
        states = [t[:, 0] for t in states]
    return x, states, mask


def rows_that_count(mask, pooling):
    return mask.sum() if pooling == "token" else mask.any(-1).sum() if pooling == "mean" else mask[:, 0].sum()


def wrap(distiller, kind):
    if kind == "ddp":
        return DistributedDataParallel(distiller)
    if kind == "fsdp1":
        policy, cpu = ModuleWrapPolicy({Block}), torch.device("cpu")
        return FullyShardedDataParallel(distiller, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for block in distiller.student:
        fully_shard(block, mesh=mesh)
    return fully_shard(distiller, mesh=mesh)


def whole_gradients(model):
    """The gradients of the unsharded parameters."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return [p.grad.clone() for p in model.parameters()]
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def train_step(rank, kind, pooling, projection, empty_rank):
    """The summed loss and the gradients of one step on this rank's part of the batch."""
    distiller = make(pooling, projection)
    names = [name for name, _ in distiller.named_parameters()]
    model = wrap(distiller, kind)
    x, teacher_rows, mask = global_batch(pooling, empty_rank)
    part = RANKS[rank]
    normalizer = rows_that_count(mask[part], pooling).double()
    dist.all_reduce(normalizer)
    loss = model(x[part], [t[part] for t in teacher_rows], mask[part], normalizer)
    (loss * WORLD).backward()  # DDP and FSDP average over the ranks, the normalizer has done so already
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total, dict(zip(names, whole_gradients(model), strict=True))


def run_cases(rank, cases, folder):
    """Entry of a spawned process: every case in turn, its results saved by rank 0 and 1."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    results = {case: train_step(rank, *case) for case in cases}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
