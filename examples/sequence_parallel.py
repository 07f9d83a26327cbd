"""Sequence parallelism: each rank holds some positions of every sequence.

The loss of a row needs nothing of another row, so the ranks only have to agree on the sum of the row weights.
Run: torchrun --nproc-per-node 2 examples/sequence_parallel.py
"""

import torch
import torch.distributed as dist

from alpkd_fast import alp_loss

BATCH, TOKENS, WIDTH, STUDENT_LAYERS, TEACHER_LAYERS = 4, 32, 64, 3, 6


def whole_batch():
    """The hidden states that a sequence-parallel model would hold in shards, and the mask (4, 32)."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(STUDENT_LAYERS, BATCH, TOKENS, WIDTH, generator=generator)
    teacher = torch.randn(TEACHER_LAYERS, BATCH, TOKENS, WIDTH, generator=generator)
    lengths = torch.tensor([32, 20, 7, 1])
    return student, teacher, (torch.arange(TOKENS) < lengths[:, None]).long()


def main():
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    student, teacher, mask = whole_batch()
    shard = slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks)
    mine = student[:, :, shard].clone().requires_grad_()

    rows = mask[:, shard].sum()
    dist.all_reduce(rows)  # the rows that count, over all ranks
    loss = alp_loss(mine, teacher[:, :, shard], mask[:, shard], normalizer=rows)
    loss.backward()  # this rank's part of the gradient, not to be averaged
    total = loss.detach()
    dist.all_reduce(total)

    reference = student.requires_grad_()
    expected = alp_loss(reference, teacher, mask)
    expected.backward()
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mine.grad, reference.grad[:, :, shard])
    print(
        f"rank {rank}: {int(mask[:, shard].sum())} rows of {int(rows)}, loss {total:.6f}, of the whole {expected:.6f}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
