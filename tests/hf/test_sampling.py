"""Batches of like length: every row once, and an order that the seed and the epoch decide."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from tiny import bert
from transformers import TrainingArguments

from alpkd_fast.hf.sampling import LengthGroupedSampler, LengthGroupedTrainer


def test_length_groups_cover_every_row_and_depend_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(2, 60, size=1000).tolist()
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(1000))
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first != list(LengthGroupedSampler(lengths, batch_size=8, seed=2))

    def padding(order):
        batches = [[lengths[i] for i in order[at : at + 8]] for at in range(0, 1000, 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(first) < 0.15 * padding(list(range(1000)))


def order(folder, rows=None, **arguments):
    rows = [{"input_ids": [2] * (1 + i % 7)} for i in range(64)] if rows is None else rows
    arguments = TrainingArguments(
        output_dir=str(folder), train_sampling_strategy="group_by_length", use_cpu=True, report_to="none", **arguments
    )
    return list(LengthGroupedTrainer(bert(1), arguments, train_dataset=rows)._get_train_sampler())


def test_the_order_follows_the_seed_of_the_data(tmp_path):
    """The seed of all where none is given for the data, as in the Trainer's own sampler."""
    assert order(tmp_path, data_seed=1) != order(tmp_path, data_seed=2)
    assert order(tmp_path, data_seed=1) == order(tmp_path, seed=1) == order(tmp_path, seed=5, data_seed=1)


def test_rows_without_a_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'train_sampling_strategy: got "group_by_length" for rows without input_ids'):
        order(tmp_path, rows=[{"input_ids": [2]}, {"sentence": "good film"}])


def test_fine_tuning_needs_no_distillation():
    code = "import sys; import alpkd_fast.hf.sampling; sys.exit('alpkd_fast.hf.trainer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
