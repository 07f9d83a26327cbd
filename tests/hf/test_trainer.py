"""The trainer: what it optimises, saves, resumes, logs and leaves alone."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import bert, bert_config, make_tokenizer, masked_lm, sentences
from tiny_models import make_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from alpkd_fast import alp_loss, make_layer_map
from alpkd_fast.hf import DistillationConfig, DistillationTrainer, student_from_teacher
from alpkd_fast.hf.data import encode
from alpkd_fast.hf.losses import soft_loss
from alpkd_fast.hf.methods import METHODS
from alpkd_fast.hf.tasks import TASKS
from alpkd_fast.hf.teacher_cache import TeacherCache
from alpkd_fast.hf.trainer import LOSS_FILE

TOKENIZER = make_tokenizer()
ROWS = encode(sentences(24, seed=1), TASKS["sst2"], TOKENIZER, 32)


def make_trainer(
    folder,
    student=None,
    teacher=None,
    callbacks=None,
    rows=ROWS,
    collator=None,
    arguments=None,
    teacher_cache=None,
    trainer_arguments=None,
    **options,
):
    teacher = bert(seed=1) if teacher is None else teacher
    if student is None:
        torch.manual_seed(2)
        student = student_from_teacher(teacher, 2, hidden_size=16)
    values = {"num_train_epochs": 2, "logging_steps": 2, "save_strategy": "no", "learning_rate": 1e-3}
    return DistillationTrainer(
        student,
        teacher,
        TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=8,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            **{**values, **(arguments or {})},
        ),
        distillation=DistillationConfig(**options),
        teacher_cache=teacher_cache,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
        processing_class=TOKENIZER,
        callbacks=callbacks,
        **(trainer_arguments or {}),
    )


@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "token"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_is_what_the_parts_say(method, pooling, tmp_path):
    """Against output_hidden_states, alp_loss and the formulas, for one batch."""
    teacher = bert(seed=1)
    student = student_from_teacher(teacher, 3, [3, 1, 0])
    trainer = make_trainer(
        tmp_path, student, teacher, method=method, pooling=pooling, ce_weight=0.2, kd_weight=0.3, alp_weight=0.7,
        temperature=3.0, scale=None if method == "uniform" else 0.4, seed=4,
    )  # fmt: skip
    batch = dict(trainer.data_collator(ROWS[:8]))
    student.train()
    loss = trainer.compute_loss(student, dict(batch))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    with torch.no_grad():
        ours, theirs = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
    expected = 0.2 * torch.nn.functional.cross_entropy(ours.logits, batch["labels"])
    expected += 0.3 * soft_loss(ours.logits, theirs.logits, batch["labels"] >= 0, 3.0) / 8
    if method != "kd":
        kind = METHODS[method].layer_map
        layer_map = make_layer_map(kind, 3, 4, torch.Generator().manual_seed(4))
        kept = 2 if method.startswith("pkd") else 3
        expected += 0.7 * alp_loss(
            ours.hidden_states[1 : 1 + kept], theirs.hidden_states[1:], batch["attention_mask"], pooling=pooling,
            layer_map=layer_map[:kept], scale=0.0 if method == "uniform" else 0.4,
            normalize=method.startswith("pkd") or method == "rail", backend="reference",
        )  # fmt: skip
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)


def test_soft_loss_is_the_divergence_of_softened_logits():
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    p, q = (t / 4).softmax(-1), (s / 4).softmax(-1)
    each = 16 * (p * (p / q).log()).sum(-1)
    counted = torch.tensor([True, True, False, True, False])
    torch.testing.assert_close(soft_loss(s, t, counted, 4.0).double(), each[counted].sum(), rtol=1e-5, atol=1e-6)


def test_learns_and_logs_every_part_under_its_name(tmp_path):
    trainer = make_trainer(tmp_path, method="alp-po", arguments={"num_train_epochs": 6})
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if "alp_loss" in name)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    names = {"ce", "kd", "alp", "alp_layer_0", "alp_layer_1", "alp_entropy_0", "alp_entropy_1"}
    for log in logs:
        assert names <= set(log)
        assert log["loss"] == pytest.approx(0.5 * log["ce"] + 0.5 * log["kd"] + log["alp"], rel=1e-4)
        assert log["alp"] == pytest.approx(log["alp_layer_0"] + log["alp_layer_1"], rel=1e-4)
        assert 0 <= log["alp_entropy_0"] <= math.log(3) + 1e-4
    assert logs[-1]["alp"] < logs[0]["alp"]
    assert trainer.layer_attention.shape == (2, 4)
    torch.testing.assert_close(trainer.layer_attention.sum(-1), torch.ones(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "kind", "pooling"),
    [
        ("bert", "ForSequenceClassification", "cls"),
        ("distilbert", "ForSequenceClassification", "cls"),
        ("bert", "ForTokenClassification", "token"),
        ("bert", "ForMaskedLM", "token"),
        ("llama", "ForSequenceClassification", "last"),
        ("gpt2", "ForSequenceClassification", "last"),
        ("llama", "ForTokenClassification", "token"),
        ("llama", "ForCausalLM", "token"),
    ],
)
def test_default_pooling_takes_the_rows_that_the_head_reads(architecture, kind, pooling, tmp_path):
    teacher, student = (make_model(architecture, kind, seed=seed) for seed in (1, 2))
    assert make_trainer(tmp_path, student, teacher).pooling == pooling


class Stream(torch.utils.data.IterableDataset):
    """Rows whose number nobody knows."""

    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize(("accumulation", "rows"), [(1, ROWS), (1, Stream()), (2, ROWS), (2, Stream())])
def test_logs_are_means_whatever_the_data_ends_with(accumulation, rows, tmp_path):
    """Three batches an epoch. A stream is asked for more after its end, and its last batch makes half a group."""
    arguments = {"max_steps": 8, "logging_steps": 3, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, rows=rows, method="alp", arguments=arguments)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["loss"] == pytest.approx(0.5 * log["ce"] + 0.5 * log["kd"] + log["alp"], rel=1e-4)
        assert log["alp_entropy_0"] == pytest.approx(math.log(4), rel=1e-3)  # of attention that is all but even
    torch.testing.assert_close(trainer.layer_attention.sum(-1), torch.ones(2), rtol=1e-4, atol=1e-4)


def test_interrupted_run_leaves_nothing_in_the_logs_of_the_next(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, method="alp", arguments={"max_steps": 3, "logging_steps": 3})
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    trainer.train()
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    assert log["loss"] == pytest.approx(0.5 * log["ce"] + 0.5 * log["kd"] + log["alp"], rel=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean", "token"])
def test_bf16_autocast_is_near_fp32(pooling, tmp_path):
    logs = []
    for bf16 in (False, True):
        trainer = make_trainer(
            tmp_path, teacher=bert(seed=1, initializer_range=0.3), method="alp", pooling=pooling,
            arguments={"max_steps": 1, "logging_steps": 1, "bf16": bf16},
        )  # fmt: skip
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("ce", "kd", "alp"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.05)  # a few layers of products of 8 bits each
        assert logs[1][name] != logs[0][name]


def test_teacher_is_frozen_and_unchanged(tmp_path):
    teacher = bert(seed=1, hidden_dropout_prob=0.5)
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(tmp_path, teacher=teacher, method="alp", arguments={"max_steps": 2})
    trainer.train()
    assert not teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_mixed_precision_leaves_the_callers_teacher_as_it_is(compiler, tmp_path):
    """The trainer's runs in bf16; the caller's stays in float32, however many trainers have used it."""
    torch._dynamo.reset()
    teacher = bert(seed=1)
    given = teacher if compiler is None else torch.compile(teacher, backend=compiler)
    ids = torch.tensor([[2, 5, 3]])
    expected = teacher.eval()(ids).logits
    seen = []
    teacher.classifier.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    for _ in range(2):
        trainer = make_trainer(tmp_path, bert(2, 16), given, arguments={"bf16": True, "max_steps": 1})
        trainer.compute_loss(trainer.model.train(), dict(trainer.data_collator(ROWS[:8])))
        assert torch.equal(teacher(ids).logits, expected)
    assert seen == [torch.bfloat16, torch.float32] * 2
    assert "forward" not in vars(teacher)


def test_needs_a_config(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    options = {"method": "alp"}
    with pytest.raises(TypeError, match=r"distillation: got dict; pass DistillationConfig\(\*\*options\)"):
        DistillationTrainer(bert(2), bert(), arguments, distillation=options)
    DistillationTrainer(bert(2), bert(), arguments, distillation=DistillationConfig(**options))


def test_parameters_shared_with_the_teacher_are_refused(tmp_path):
    """They would be frozen with it."""
    teacher, student = bert(seed=1), bert(2)
    student.bert.embeddings = teacher.bert.embeddings
    with pytest.raises(ValueError, match=r"model: bert\.embeddings\..* and 4 more of its parameters are the teacher's"):
        make_trainer(tmp_path, student, teacher)
    own = make_trainer(tmp_path, copy.deepcopy(student), teacher).model
    assert all(p.requires_grad for p in own.parameters())
    student.bert.embeddings.requires_grad_(False)
    make_trainer(tmp_path, student, teacher, arguments={"max_steps": 1}).train()


def test_evaluation_is_the_trainers_own(tmp_path):
    trainer = make_trainer(tmp_path, method="alp")
    plain = Trainer(copy.deepcopy(trainer.model), trainer.args, eval_dataset=ROWS, processing_class=TOKENIZER)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@pytest.mark.parametrize("method", ["alp", "kd"])
def test_saved_student_is_plain(method, tmp_path):
    trainer = make_trainer(tmp_path / "run", method=method, arguments={"max_steps": 1})
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    code = (
        "import sys, torch; sys.modules['alpkd_fast'] = None\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "model, info = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "print(model.eval()(torch.tensor([[2, 5, 3]])).logits.flatten().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "student"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = trainer.model.eval()(torch.tensor([[2, 5, 3]])).logits.flatten().tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "student" / LOSS_FILE).exists() == (method == "alp")
    assert set(load_file(tmp_path / "student" / "model.safetensors")) == {
        name for name in trainer.model.state_dict() if not name.startswith("alp_loss")
    }


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_save, control.should_training_stop = True, True


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
@pytest.mark.parametrize("method", ["alp", "rail"])
def test_resumed_run_ends_where_an_uninterrupted_one_does(method, sampling, tmp_path):
    """Stopped inside the second epoch: weights, φ, optimizer, order of the rows and RAIL-KD's map go on."""
    arguments = {"num_train_epochs": 3, "train_sampling_strategy": sampling}
    whole = make_trainer(tmp_path / "whole", method=method, arguments=arguments)
    whole.train()
    first = make_trainer(tmp_path / "cut", method=method, arguments=arguments, callbacks=[StopAt(5)])
    first.train()
    assert first.state.global_step == 5 < whole.state.max_steps
    again = make_trainer(tmp_path / "cut", method=method, arguments=arguments)
    again.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_resume_without_the_projection_says_so(tmp_path):
    trainer = make_trainer(tmp_path, method="alp", callbacks=[StopAt(1)])
    trainer.train()
    (tmp_path / "checkpoint-1" / LOSS_FILE).unlink()
    with pytest.raises(ValueError, match=r"has no alp_loss\.safetensors"):
        make_trainer(tmp_path, method="alp").train(resume_from_checkpoint=True)


def test_rail_draws_a_map_for_each_epoch(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **_):
            seen.append(model.alp_loss.options["layer_map"])

    make_trainer(tmp_path, method="rail", seed=3, callbacks=[Watch()], arguments={"num_train_epochs": 4}).train()
    generator = torch.Generator().manual_seed(3)
    assert seen == [make_layer_map("random", 2, 4, generator) for _ in range(4)]
    assert len(set(seen)) > 1


def test_compiled_models_follow_the_epochs(tmp_path):
    """A new map in each epoch, and an evaluation, without the capture, between them."""
    torch._dynamo.reset()
    logs = {}
    for compiler in (None, "aot_eager"):
        arguments = {"num_train_epochs": 3, "eval_strategy": "epoch", "torch_compile_backend": compiler}
        trainer = make_trainer(tmp_path, method="rail", seed=3, arguments=arguments)
        trainer.train()
        logs[compiler] = trainer.state.log_history
    names = ("loss", "ce", "kd", "alp", "alp_layer_0", "alp_layer_1", "eval_loss")
    plain, compiled = ([[log.get(name, 0.0) for name in names] for log in logs[key]] for key in logs)
    # Rounding in another order, carried on by 9 steps of an optimizer that divides by the size of a gradient
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-4, atol=1e-6)


def test_masked_language_model(tmp_path):
    teacher = masked_lm(seed=1)
    rows = unlabelled()
    collator = DataCollatorForLanguageModeling(TOKENIZER, mlm_probability=0.3)
    trainer = make_trainer(
        tmp_path, student_from_teacher(teacher, 2), teacher, rows=rows, collator=collator, method="alp",
        arguments={"num_train_epochs": 8},
    )  # fmt: skip
    assert trainer.pooling == "token"
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < logs[0]["loss"]


@pytest.mark.parametrize("pooling", ["token", "last"])
def test_decoder_with_activation_checkpointing(pooling, tmp_path):
    """Shifted labels, and the same gradients as without checkpointing."""
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 50, (8, 9)).tolist()]
    gradients = []
    for checkpointing in (False, True):
        teacher = make_model("llama", "ForCausalLM", seed=1)
        trainer = make_trainer(
            tmp_path, student_from_teacher(teacher, 2), teacher, rows=rows, method="alp", pooling=pooling,
            arguments={"activation_checkpointing": checkpointing}, collator=lambda rows: {
                name: torch.tensor([row[name] for row in rows]) for name in rows[0]
            },
        )  # fmt: skip
        if checkpointing:
            trainer.model.activation_checkpointing_enable()
        trainer.model.train()
        batch = trainer.data_collator(rows)
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            logits = trainer.model(input_ids=batch["input_ids"]).logits
        ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        torch.testing.assert_close(trainer._log._sums["ce"], ce)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_regression(tmp_path):
    teacher = bert(seed=1, num_labels=1)
    rows = [{**row, "labels": float(row["labels"])} for row in ROWS]
    student = student_from_teacher(teacher, 2)
    trainer = make_trainer(tmp_path, student, teacher, rows=rows, method="kd", ce_weight=1.0, kd_weight=2.0)
    batch = dict(trainer.data_collator(rows[:8]))
    student.train()
    loss = trainer.compute_loss(student, dict(batch))
    labels = batch.pop("labels")
    ours, theirs = student(**batch).logits[:, 0], teacher(**batch).logits[:, 0]
    expected = (ours - labels).square().mean() + 2 * (ours - theirs).square().mean()
    torch.testing.assert_close(loss, expected)


def test_without_labels(tmp_path):
    rows = unlabelled()
    trainer = make_trainer(tmp_path, rows=rows, method="alp", ce_weight=0.0, arguments={"max_steps": 2})
    trainer.train()
    with pytest.raises(ValueError, match="ce_weight is above 0, but the batch has no labels"):
        make_trainer(tmp_path, rows=rows, method="alp", arguments={"max_steps": 1}).train()


def unlabelled(rows=ROWS):
    return [{k: v for k, v in row.items() if k != "labels"} for row in rows]


def test_without_labels_every_token_of_a_token_classifier_counts(tmp_path):
    """As many rows as tokens a row: the rows are not taken for the tokens."""
    teacher, student = (
        make_model("bert", "ForTokenClassification", seed=seed, num_labels=5, initializer_range=0.5) for seed in (1, 2)
    )
    mask = torch.arange(8)[None] < torch.tensor([4, 8] * 4)[:, None]
    batch = {"input_ids": torch.arange(3, 67).view(8, 8) % 50, "attention_mask": mask.long()}
    losses = []
    for labels in ({}, {"labels": mask.long() - 1 + 99 * (mask.long() - 1)}):  # 0, and -100 for padding
        trainer = make_trainer(tmp_path, student, teacher, method="kd", ce_weight=0.0, kd_weight=1.0)
        losses.append(trainer.compute_loss(student.train(), {**batch, **labels}))
    torch.testing.assert_close(losses[0], losses[1])


def test_without_labels_logits_of_another_shape_are_refused(tmp_path):
    """Of a model that does not say what it predicts."""
    trainer = make_trainer(tmp_path, ce_weight=0.0)
    trainer.model.register_forward_hook(lambda module, args, output: output | {"logits": torch.zeros(8, 5, 2)})
    trainer.teacher.register_forward_hook(lambda module, args, output: output | {"logits": torch.zeros(8, 5, 2)})
    with pytest.raises(ValueError, match=r"BertForSequenceClassification gives logits \(8, 5, 2\) for a batch without"):
        trainer.compute_loss(trainer.model.train(), dict(trainer.data_collator(unlabelled(ROWS[:8]))))


@pytest.mark.parametrize(
    ("options", "student", "message"),
    [
        ({"method": "pkd-skip"}, {"num_layers": 1}, "leaves the last student layer out"),
        ({"method": "alp", "projection": "none"}, {"num_layers": 2, "hidden_size": 16}, 'projection="none"'),
        ({"method": "alp", "student_layers": [0, 2]}, {"num_layers": 2}, r"student_layers: got \[0, 2\]"),
        ({"method": "alp", "layer_map": [[0]]}, {"num_layers": 2}, "layer_map: got 1 rows, but 2 student layers"),
        ({"method": "skip"}, {"num_layers": 2}, "method: got 'skip'"),
    ],
)
def test_refuses_what_does_not_fit(options, student, message, tmp_path):
    teacher = bert(seed=1)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, student_from_teacher(teacher, **student), teacher, **options)


def test_refuses_a_teacher_of_other_outputs(tmp_path):
    trainer = make_trainer(tmp_path, teacher=bert(seed=1), student=bert(2, num_labels=3), method="kd")
    with pytest.raises(ValueError, match="both need the same outputs"):
        trainer.train()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("BertForQuestionAnswering", {"method": "kd"}, "gives no logits .* set ce_weight=0 and kd_weight=0"),
        ("LlamaForQuestionAnswering", {}, "gives no logits"),
        ("BertForPreTraining", {}, "gives no logits"),
        ("ElectraForPreTraining", {}, "gives no logits of classes"),
        ("BertModel", {}, "gives no logits"),
        ("BertForMultipleChoice", {}, 'reads .rows, choices, tokens.*use method="kd"'),
        ("ViTForImageClassification", {}, "reads pixel_values; allowed are models that read input_ids"),
    ],
)
def test_refuses_models_that_the_losses_cannot_read(model, options, message, tmp_path):
    config = getattr(transformers, model).config_class(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    with pytest.raises(ValueError, match=f"model: {model} {message}"):
        make_trainer(tmp_path, getattr(transformers, model)(config), bert(seed=1), **options)
    with pytest.raises(ValueError, match=f"teacher: {model} {message}"):
        make_trainer(tmp_path, bert(2), getattr(transformers, model)(config), **options)


@pytest.mark.parametrize("kind", ["ForQuestionAnswering", "ForPreTraining", "Model"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states_need_no_logits(kind, return_dict, tmp_path):
    """The loss is alp_loss alone, and every parameter has a gradient, as in the other ranks."""
    config = bert_config(return_dict=return_dict)
    teacher, student = (getattr(transformers, f"Bert{kind}")(config) for _ in range(2))
    trainer = make_trainer(tmp_path, student, teacher, ce_weight=0.0, kd_weight=0.0, method="alp", pooling="mean")
    batch = dict(trainer.data_collator(unlabelled(ROWS[:8])))
    loss = trainer.compute_loss(student.train(), dict(batch))
    ours, theirs = (m(**batch, output_hidden_states=True, return_dict=True).hidden_states for m in (student, teacher))
    expected = alp_loss(ours[1:], theirs[1:], batch["attention_mask"], pooling="mean", backend="reference")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


def test_answers_are_kept_from_the_models(tmp_path):
    """As labels are: a loss that nobody asked for would be NaN here, where every answer was cut off."""
    teacher, student = (make_model("bert", "ForQuestionAnswering", seed=seed) for seed in (1, 2))
    trainer = make_trainer(tmp_path, student, teacher, ce_weight=0.0, kd_weight=0.0, method="alp")
    batch = dict(trainer.data_collator(unlabelled(ROWS[:8])))
    expected = trainer.compute_loss(student.train(), dict(batch))
    end = torch.full((8,), batch["input_ids"].shape[1])
    loss, outputs = trainer.compute_loss(student, {**batch, "start_positions": end, "end_positions": end}, True)
    assert loss == expected
    assert "loss" not in outputs


def test_outputs_as_tuples_train_too(tmp_path):
    losses = []
    for return_dict in (True, False):
        teacher, student = bert(seed=1, return_dict=return_dict), bert(2, seed=2, return_dict=return_dict)
        trainer = make_trainer(tmp_path, student, teacher, method="alp")
        losses.append(trainer.compute_loss(student.train(), dict(trainer.data_collator(ROWS[:8]))))
    assert losses[0] == losses[1]


def test_multiple_choice_with_kd(tmp_path):
    teacher, student = (make_model("bert", "ForMultipleChoice", seed=seed) for seed in (1, 2))
    trainer = make_trainer(tmp_path, student, teacher, method="kd", ce_weight=1.0, kd_weight=0.0)
    ids = torch.arange(3, 51).view(4, 3, 4) % 50
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 0])}
    torch.testing.assert_close(trainer.compute_loss(student.train(), dict(batch)), student.eval()(**batch).loss)


def test_embeddings_for_tokens_need_a_mask(tmp_path):
    trainer = make_trainer(tmp_path, bert(2), bert(seed=1), method="alp")
    batch = {"inputs_embeds": torch.randn(2, 5, 32), "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=r"attention_mask: the batch has neither .* but inputs_embeds, labels"):
        trainer.compute_loss(trainer.model.train(), dict(batch))
    batch["attention_mask"] = torch.ones(2, 5, dtype=torch.int64)
    assert trainer.compute_loss(trainer.model.train(), batch).isfinite()


def test_needs_a_teacher(tmp_path):
    with pytest.raises(ValueError, match="teacher: got None"):
        DistillationTrainer(bert(), None, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_save_pretrained_of_the_trained_model_is_plain_too(tmp_path):
    trainer = make_trainer(tmp_path / "run", method="alp", arguments={"max_steps": 1})
    trainer.model.save_pretrained(tmp_path / "direct")
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "direct", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("method", ["kd", "alp"])
def test_teacher_cache_changes_nothing_and_spares_the_teacher(method, size, tmp_path):
    rows = [{**row, "row": number} for number, row in enumerate(ROWS)]
    cache, results, calls = TeacherCache(), [], []
    for shared in (None, cache, cache):
        trainer = make_trainer(
            tmp_path, rows=rows, method=method, pooling="mean", teacher_cache=shared, teacher_batch_size=size
        )
        trainer.teacher.register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        results.append((trainer.model.state_dict(), len(calls)))
        calls.clear()
    parts = 1 if size is None else 3  # of 8 rows
    # two epochs of three batches; one of them; none
    assert [count for _, count in results] == [6 * parts, 3 * parts, 0]
    for state, _ in results[1:]:
        for name, value in results[0][0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_teacher_cache_lies_in_the_cpus_memory():
    """The accelerator's would fill up with the data. "meta" stands for one: fake tensors are moved there and back."""

    class Numbers:
        device = torch.device("meta")

        def tolist(self):
            return [3, 5]

    cache = TeacherCache()
    with FakeTensorMode():
        first = torch.empty(2, 4, device="meta"), [torch.empty(2, 8, device="meta") for _ in range(3)]
        assert cache.get("cls", Numbers(), lambda: first) is not None
        kept = [tensor for rows in cache._kept.values() for row in rows.values() for tensor in row]
        assert {tensor.device.type for tensor in kept} == {"cpu"}
        logits, layers = cache.get("cls", Numbers(), pytest.fail)
    assert [tensor.device.type for tensor in (logits, *layers)] == ["meta"] * 4
    assert [tensor.shape for tensor in (logits, *layers)] == [(2, 4), *[(2, 8)] * 3]


def test_teacher_cache_refuses_every_token(tmp_path):
    with pytest.raises(ValueError, match='teacher_cache: pooling "token" would keep every token'):
        make_trainer(tmp_path, method="alp", pooling="token", teacher_cache=TeacherCache())


@pytest.mark.parametrize("kind", ["ForTokenClassification", "ForMaskedLM"])
def test_teacher_cache_refuses_logits_of_tokens(kind, tmp_path):
    """They differ in length, and a masked language model's rows are masked anew each time."""
    options = {"method": "alp", "pooling": "cls", "teacher_cache": TeacherCache()}
    teacher, student = (make_model("bert", kind, seed=seed) for seed in (1, 2))
    with pytest.raises(ValueError, match=f"teacher_cache: got one, but Bert{kind} predicts tokens, whose"):
        make_trainer(tmp_path, student, teacher, **options)
    rows = [{**row, "row": number} for number, row in enumerate(unlabelled())]
    trainer = make_trainer(tmp_path, student, teacher, rows=rows, ce_weight=0.0, kd_weight=0.0, **options)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 3  # batches of the first of two epochs


def segments():
    """Like ROWS, with the second half of each row in segment 1."""
    return [
        {**row, "token_type_ids": [int(2 * at >= len(row["input_ids"])) for at in range(len(row["input_ids"]))]}
        for row in ROWS
    ]


@pytest.mark.parametrize("kind", ["SEQ_CLS", None])
def test_adapters_get_every_input(kind, tmp_path):
    """A fresh LoRA changes nothing, so neither does it change the loss; its forward does not name token_type_ids."""
    peft = pytest.importorskip("peft", reason="adapters need peft")

    def adapted(model):
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type=kind))

    losses = []
    for wrap in (lambda model: model, adapted):
        teacher, student = bert(seed=1, initializer_range=0.3), bert(2, seed=2, initializer_range=0.3)
        trainer = make_trainer(tmp_path, wrap(student), wrap(teacher), rows=segments(), method="alp")
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["token_type_ids"].any()
        losses.append(trainer.compute_loss(trainer.model.train(), dict(batch)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_compiled_teacher_is_the_plain_one(tmp_path):
    torch._dynamo.reset()
    logs = []
    for compiler in (None, "aot_eager"):
        teacher = bert(seed=1, initializer_range=0.3)
        trainer = make_trainer(
            tmp_path, bert(2, 16, seed=2), teacher if compiler is None else torch.compile(teacher, backend=compiler),
            rows=segments(), method="alp", arguments={"max_steps": 2, "logging_steps": 1},
        )  # fmt: skip
        trainer.train()
        logs.append([[log[name] for name in ("loss", "kd", "alp")] for log in trainer.state.log_history if "kd" in log])
    torch.testing.assert_close(torch.tensor(logs[1]), torch.tensor(logs[0]), rtol=1e-5, atol=1e-6)


def test_refuses_a_compiled_student(tmp_path):
    with pytest.raises(ValueError, match=r"model: got a student inside OptimizedModule; .* torch_compile=True"):
        make_trainer(tmp_path, torch.compile(bert(2), backend="eager"), bert(seed=1))


@pytest.mark.parametrize("kind", ["classification", "mlm"])
def test_label_smoothing_is_the_trainers(kind, tmp_path):
    """The loss in training is the one in evaluation."""
    mlm = kind == "mlm"
    teacher = (masked_lm if mlm else bert)(seed=1, initializer_range=0.3)
    trainer = make_trainer(
        tmp_path, student_from_teacher(teacher, 2), teacher, method="kd", ce_weight=1.0, kd_weight=0.0,
        arguments={"label_smoothing_factor": 0.3},
    )  # fmt: skip
    batch = dict(trainer.data_collator(ROWS[:8]))
    if mlm:
        batch["labels"] = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) % 3 != 1, -100)
    training = trainer.compute_loss(trainer.model.train(), dict(batch))
    evaluation = trainer.compute_loss(trainer.model.eval(), dict(batch))
    torch.testing.assert_close(training, evaluation)


def test_refuses_a_loss_function(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="compute_loss_func: got a function; the training loss is"):
        DistillationTrainer(bert(2), bert(), arguments, compute_loss_func=lambda *_: None)


@pytest.mark.parametrize(
    ("outputs", "labels", "got"),
    [
        (8, [1.0] * 8, r"float32 \(8, 8\)"),  # as many outputs as rows: nothing else would notice
        (3, [1.0, 0.0, 1.0], r"float32 \(8, 3\)"),
        (3, [1, 0, 1], r"int64 \(8, 3\)"),
        (2, 1.0, r"float32 \(8,\)"),
        (1, 0, r"int64 \(8,\)"),
    ],
)
@pytest.mark.parametrize("weights", [{"kd_weight": 0.0}, {"ce_weight": 0.0}])
def test_refuses_labels_of_another_task(weights, outputs, labels, got, tmp_path):
    rows = [{**row, "labels": labels} for row in ROWS]
    teacher, student = bert(seed=1, num_labels=outputs), bert(2, num_labels=outputs)
    trainer = make_trainer(tmp_path, student, teacher, rows=rows, **weights)
    with pytest.raises(ValueError, match=rf"labels: got {got} for logits \(8, {outputs}\); allowed are"):
        trainer.compute_loss(trainer.model.train(), dict(trainer.data_collator(rows[:8])))


@pytest.mark.parametrize(
    "config", [{"problem_type": "multi_label_classification"}, {"problem_type": "regression", "num_labels": 3}]
)
def test_refuses_a_task_whose_logits_are_no_classes(config, tmp_path):
    teacher, student = bert(seed=1, **config), bert(2, **config)
    with pytest.raises(ValueError, match=f"model: its config.problem_type is '{config['problem_type']}' with"):
        make_trainer(tmp_path, student, teacher, ce_weight=0.0)
    make_trainer(tmp_path, student, teacher, ce_weight=0.0, kd_weight=0.0, arguments={"max_steps": 1}).train()


def test_refuses_to_smooth_a_regression(tmp_path):
    rows = [{**row, "labels": float(row["labels"])} for row in ROWS]
    arguments = {"label_smoothing_factor": 0.1}
    trainer = make_trainer(
        tmp_path, bert(2, num_labels=1), bert(num_labels=1), rows=rows, method="kd", arguments=arguments
    )
    with pytest.raises(ValueError, match=r"label_smoothing_factor: got 0\.1, but floating-point labels"):
        trainer.compute_loss(trainer.model.train(), dict(trainer.data_collator(rows[:8])))


def test_start_of_the_projection_depends_on_the_seed_alone(tmp_path):
    starts = []
    for before, seed in ((1, 42), (2, 42), (2, 43)):
        student = bert(2, 16)
        torch.manual_seed(before)
        starts.append(make_trainer(tmp_path, student, arguments={"seed": seed}).model.alp_loss.proj_weight)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_the_learned_scale_does_not_decay(tmp_path):
    """Decay of its logarithm would pull it to 1."""
    trainer = make_trainer(tmp_path, method="alp", learn_scale=True, arguments={"weight_decay": 0.1})
    trainer.create_optimizer()
    module = trainer.model.alp_loss
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decay[id(module.log_scale)] == 0.0
    assert decay[id(module.proj_weight)] == 0.1


def test_an_optimizer_without_the_projection_is_refused(tmp_path):
    student = bert(2, 16)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    given = {"optimizers": (optimizer, None)}
    with pytest.raises(ValueError, match=r"optimizers: .* \(proj_weight, proj_bias\), .*optimizer_cls_and_kwargs"):
        make_trainer(tmp_path, student, method="alp", trainer_arguments=given)
    make_trainer(tmp_path, student, method="kd", trainer_arguments=given)  # learns nothing of its own
    trainer = make_trainer(
        tmp_path, student, method="alp", arguments={"max_steps": 1},
        trainer_arguments={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
    )  # fmt: skip
    before = trainer.model.alp_loss.proj_weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.alp_loss.proj_weight, before)


def test_a_student_used_before_leaves_its_loss_behind(tmp_path):
    student, teacher = bert(2, 16), bert(seed=1)
    make_trainer(tmp_path, student, teacher, method="alp")
    trainer = make_trainer(tmp_path, student, teacher, method="kd", arguments={"max_steps": 1})
    assert not any("alp_loss" in name for name, _ in trainer.model.named_parameters())
    trainer.train()
    trainer.save_model(str(tmp_path))
    assert not (tmp_path / LOSS_FILE).exists()


SEQ2SEQ_SIDE = {"layers": 2, "attention_heads": 2, "ffn_dim": 16}


def make_seq2seq(kind="ForConditionalGeneration", **changes):
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SEQ2SEQ_SIDE.items()}
    config = transformers.BartConfig(vocab_size=50, d_model=16, max_position_embeddings=32, **{**sizes, **changes})
    torch.manual_seed(1)
    return getattr(transformers, f"Bart{kind}")(config)


def test_encoder_decoders_need_the_decoders_inputs(tmp_path):
    """Without them BART's decoder reads input_ids, not the labels, which the trainer keeps from the model."""
    teacher = make_seq2seq()
    student = make_seq2seq(dropout=0.0)
    rows = [{"input_ids": [2, 3 + i, 40, 2], "labels": [2, 5, 7 + i, 2]} for i in range(8)]
    collators = [transformers.DataCollatorForSeq2Seq(TOKENIZER, model=model) for model in (None, student)]
    bare, full = (
        make_trainer(tmp_path, student, teacher, rows=rows, collator=collator, method="kd", kd_weight=0.0)
        for collator in collators
    )
    with pytest.raises(ValueError, match=r"decoder_input_ids: got none .*DataCollatorForSeq2Seq"):
        bare.compute_loss(student.train(), dict(collators[0](rows)))
    with pytest.raises(ValueError, match=r"labels: got none for BartForConditionalGeneration; .* hold labels"):
        full.compute_loss(student.train(), {k: v for k, v in collators[1](rows).items() if k != "labels"})
    batch = dict(collators[1](rows))
    loss = full.compute_loss(student.train(), dict(batch))
    torch.testing.assert_close(loss, 0.5 * student(**batch).loss)


def test_hidden_states_of_an_encoder_decoder_are_refused(tmp_path):
    """Of unequal depths one side would be taken, whichever has the number of config.num_hidden_layers."""
    with pytest.raises(ValueError, match=r'model: BartForConditionalGeneration has hidden .*use method="kd"'):
        make_trainer(tmp_path, make_seq2seq(decoder_layers=1), make_seq2seq(), method="alp")


def test_classification_by_an_encoder_decoder_needs_none(tmp_path):
    """Its decoder reads input_ids by design."""
    teacher, student = (make_seq2seq("ForSequenceClassification", num_labels=2, eos_token_id=3) for _ in range(2))
    trainer = make_trainer(tmp_path, student, teacher, method="kd")
    assert trainer.compute_loss(student.train(), dict(trainer.data_collator(ROWS[:8]))).isfinite()


@pytest.mark.parametrize("method", ["kd", "alp"])
def test_a_decoding_teacher_keeps_no_cache(method, tmp_path):
    teacher = make_model("llama", "ForCausalLM", seed=1)
    seen = []
    teacher.register_forward_hook(lambda module, args, output: seen.append(output))
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 50, (8, 9)).tolist()]
    trainer = make_trainer(tmp_path, student_from_teacher(teacher, 2), teacher, rows=rows, method=method)
    trainer.compute_loss(trainer.model.train(), {name: torch.tensor([row[name] for row in rows]) for name in rows[0]})
    assert [set(output) for output in seen] == [{"logits"}]


def test_a_final_norm_in_float32_is_compared_all_the_same(tmp_path):
    """As CUDA's autocast has it for a bf16 GPT-2: blocks in bf16, nn.LayerNorm in float32."""
    teacher = make_model("gpt2", "ForCausalLM", seed=1).bfloat16()
    student = student_from_teacher(teacher, 2)
    for model in (teacher, student):
        model.transformer.ln_f.register_forward_hook(lambda module, args, output: output.float())
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 50, (8, 9)).tolist()]
    trainer = make_trainer(
        tmp_path, student, teacher, rows=rows, collator=transformers.default_data_collator, method="alp",
        arguments={"bf16": True, "max_steps": 1, "logging_steps": 1},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["alp"] > 0
