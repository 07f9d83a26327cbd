"""The teacher on a part of the batch at a time: what is run, what is alive, what is logged."""

from __future__ import annotations

import weakref

import pytest
import torch
from tiny import bert, make_tokenizer, masked_lm, sentences
from transformers import TrainingArguments

from alpkd_fast.hf import DistillationConfig, DistillationTrainer, student_from_teacher
from alpkd_fast.hf.data import encode
from alpkd_fast.hf.tasks import TASKS
from alpkd_fast.hf.teacher_parts import run_in_parts, whole_outputs

TOKENIZER = make_tokenizer()
ROWS = encode(sentences(8, seed=1), TASKS["sst2"], TOKENIZER, 32)
LAYERS, WIDTH = 4, 32


def trainer_and_batch(folder, make=bert, **options):
    teacher = make(LAYERS, WIDTH, seed=1, initializer_range=0.3)
    torch.manual_seed(2)
    student = student_from_teacher(teacher, 2).train()
    trainer = DistillationTrainer(
        student,
        teacher,
        TrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, report_to="none"),
        distillation=DistillationConfig(**options),
        train_dataset=ROWS,
        processing_class=TOKENIZER,
    )
    return trainer, dict(trainer.data_collator(ROWS))


class Watch:
    """Sizes of the teacher's forwards, in order with the student's, and bytes of its hidden states that are alive."""

    def __init__(self, trainer):
        self.order, self.storages, self.most = [], [], 0
        student, teacher = trainer.model, trainer.teacher
        student.bert.register_forward_hook(lambda *_: self.order.append("student"))
        teacher.bert.register_forward_hook(lambda _, args, output: self.order.append(len(output[0])))
        for block in teacher.bert.encoder.layer:
            block.register_forward_hook(self.count)

    def count(self, _, args, output):
        h = output if isinstance(output, torch.Tensor) else output[0]
        self.storages.append((weakref.ref(h.untyped_storage()), h.nbytes))
        self.most = max(self.most, self.alive)

    @property
    def alive(self):
        return sum(size for storage, size in self.storages if storage() is not None)


@pytest.mark.parametrize(("size", "there"), [(None, 8), (8, 8), (3, 3), (1, 1)])
def test_tokens_of_one_part_are_alive(size, there, tmp_path):
    trainer, batch = trainer_and_batch(tmp_path, pooling="token", teacher_batch_size=size)
    watch = Watch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    assert watch.most == LAYERS * there * batch["input_ids"].shape[1] * WIDTH * 4
    assert watch.alive == 0, "the loss keeps the teacher's states"
    assert watch.order == {8: [8, "student"], 3: ["student", 3, 3, 2], 1: ["student", *[1] * 8]}[there]
    loss.backward()


@pytest.mark.parametrize("options", [{"pooling": "cls"}, {"pooling": "mean"}, {"pooling": "last"}, {"method": "kd"}])
def test_pooled_rows_come_from_parts_before_the_student(options, tmp_path):
    trainer, batch = trainer_and_batch(tmp_path, teacher_batch_size=3, **options)
    watch = Watch(trainer)
    trainer.compute_loss(trainer.model, batch)
    assert watch.order == [3, 3, 2, "student"]
    assert watch.most <= 2 * 3 * batch["input_ids"].shape[1] * WIDTH * 4  # a block's input and its output


@pytest.mark.parametrize(
    "options", [{}, {"projection": "shared"}, {"projection": "shared", "projected_side": "student"}]
)
def test_the_mean_attention_is_that_of_the_whole_batch(options, tmp_path):
    attention = []
    for size in (None, 3):
        trainer, batch = trainer_and_batch(tmp_path, pooling="token", scale=1.0, teacher_batch_size=size, **options)
        batch["attention_mask"][6:] = 0  # the last part
        trainer._log.begin(1, 1)
        trainer.compute_loss(trainer.model, batch)
        trainer.log({"loss": 0.0})
        attention.append(trainer.layer_attention)
    torch.testing.assert_close(attention[1], attention[0])
    assert attention[0].std() > 0.01  # not a uniform one, which parts could not change


def test_logits_of_every_token_are_put_together(tmp_path):
    """A masked language model: (B, S, V) logits, of which some positions are labelled."""
    losses = []
    for size in (None, 3):
        trainer, batch = trainer_and_batch(tmp_path, masked_lm, teacher_batch_size=size, alp_weight=0.0)
        batch["labels"] = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) % 3 != 1, -100)
        losses.append(trainer.compute_loss(trainer.model, batch))
    torch.testing.assert_close(losses[1], losses[0])


def test_inputs_without_an_entry_per_sequence_go_to_each_part():
    seen = []

    def run(inputs):
        seen.append({name: getattr(value, "shape", value) for name, value in inputs.items()})
        return inputs["tokens"].sum(-1, keepdim=True), [inputs["tokens"], -inputs["tokens"]]

    tokens = torch.arange(10).view(5, 2)
    inputs = {"tokens": tokens, "positions": tokens[:1], "scalar": torch.tensor(1), "flag": True, "none": None}
    logits, (first, second) = whole_outputs(run, inputs, 5, 2)
    assert torch.equal(logits, tokens.sum(-1, keepdim=True))
    assert torch.equal(first, tokens)
    assert torch.equal(second, -tokens)
    rest = {"positions": (1, 2), "scalar": (), "flag": True, "none": None}
    assert seen == [{"tokens": (rows, 2), **rest} for rows in (2, 2, 1)]


def test_where_parts_lie():
    places = []
    run_in_parts(lambda inputs: (inputs["x"], None), {"x": torch.zeros(5)}, 5, 2, lambda _, part: places.append(part))
    assert [range(5)[place] for place in places] == [range(2), range(2, 4), range(4, 5)]
