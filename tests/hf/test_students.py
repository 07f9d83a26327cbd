"""student_from_teacher: the layers that were asked for, for every architecture."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, LAYERS, make_batch, make_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alpkd_fast.hf import student_from_teacher
from alpkd_fast.hf.students import find_layers

DECODERS = ("gpt2", "llama")


def make_teacher(name):
    return make_model(name, "ForCausalLM" if name in DECODERS else "ForSequenceClassification")


def layer_state(model, index):
    prefix = f"{find_layers(model, model.config.num_hidden_layers)}.{index}."
    return {key.removeprefix(prefix): value for key, value in model.state_dict().items() if key.startswith(prefix)}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("layers", "picks"), [("skip", [0, 2]), ("first", [0, 1]), ("last", [1, 2]), ([2, 1], [2, 1])])
def test_copies_the_layers_and_all_the_rest(name, layers, picks):
    teacher = make_teacher(name)
    student = student_from_teacher(teacher, 2, layers)
    assert student.config.num_hidden_layers == 2
    for i, j in enumerate(picks):
        source = layer_state(teacher, j)
        for key, value in layer_state(student, i).items():
            assert key not in source or torch.equal(value, source[key]), (i, key)
    prefix = find_layers(student, 2)
    outside = {key for key in student.state_dict() if not key.startswith(prefix + ".")}
    assert outside == {key for key in teacher.state_dict() if not key.startswith(prefix + ".")}
    for key in outside:
        assert torch.equal(student.state_dict()[key], teacher.state_dict()[key]), key


@pytest.mark.parametrize("name", CONFIGS)
def test_all_layers_give_the_teacher_itself(name):
    teacher = make_teacher(name)
    student = student_from_teacher(teacher, LAYERS)
    batch = make_batch()
    with torch.no_grad():
        assert torch.equal(student.eval()(**batch).logits, teacher.eval()(**batch).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_narrower_students_run_and_reload(name, tmp_path):
    teacher = make_teacher(name)
    student = student_from_teacher(teacher, 2, hidden_size=8).eval()
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (8, 2)
    student.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if name in DECODERS else AutoModelForSequenceClassification
    again = auto.from_pretrained(tmp_path, attn_implementation="eager").eval()
    batch = make_batch()
    with torch.no_grad():
        assert torch.equal(student(**batch).logits, again(**batch).logits)


def test_modernbert_keeps_the_kind_of_each_layer():
    teacher = make_model("modernbert", "ForSequenceClassification")
    kinds = teacher.config.layer_types
    assert student_from_teacher(teacher, 2, [1, 2]).config.layer_types == [kinds[1], kinds[2]]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "num_layers: got 0; allowed are 1 to the teacher's 3"),
        ((4,), {}, "num_layers: got 4"),
        ((2, "odd"), {}, "layers: got 'odd'; allowed are skip, first, last"),
        ((2, [0]), {}, "2 student layers need 2 teacher layers from 0 to 2"),
        ((2, [0, 3]), {}, "from 0 to 2"),
        ((2,), {"hidden_size": 12}, "multiples of the head size 8"),
        ((2,), {"hidden_sizes": 8}, "has no value 'hidden_sizes'"),
    ],
)
def test_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        student_from_teacher(make_teacher("bert"), *arguments, **options)
