"""Batches of rows of like length, in an order that a resumed run finds again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """Rows of like length beside each other, in an order that only (seed, epoch) decides.

    The Trainer's own sampler draws from the global generator, so that a run resumed inside an epoch
    would see some rows twice and others never.
    """

    POOL = 50  # batches that are sorted together: more gives less padding and less randomness

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.batch_size * self.POOL
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=lambda i: -self.lengths[i])
            batches += [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        # Shuffle whole batches; a last short one must stay last, as the loader cuts every batch_size rows.
        short = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return iter([i for b in [*(batches[k] for k in shuffled), *short] for i in b])


class LengthGroupedTrainer(Trainer):
    """A Trainer that resumes ``train_sampling_strategy="group_by_length"`` exactly where the data is a list of rows."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(data, list):
            return super()._get_train_sampler(train_dataset)
        if not all("input_ids" in row for row in data):
            raise ValueError(
                'train_sampling_strategy: got "group_by_length" for rows without input_ids, whose length is not known; '
                'tokenise the rows beforehand, or use "random"'
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler([len(row["input_ids"]) for row in data], self._train_batch_size, seed)
