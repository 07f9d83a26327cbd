"""student_from_teacher: the layers that were asked for, for every architecture."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, LAYERS, make_batch, make_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
)

from alpkd_fast.capture.blocks import block_lists
from alpkd_fast.hf import student_from_teacher

BART = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 50}
DECODERS = ("gpt2", "llama")


def make_teacher(name):
    return make_model(name, "ForCausalLM" if name in DECODERS else "ForSequenceClassification")


def layer_state(model, index):
    prefix = f"{block_lists(model)[0][0]}.{index}."
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
    prefix = block_lists(student)[0][0]
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


@pytest.mark.parametrize("depths", [(4, 4), (4, 2)])
@pytest.mark.parametrize("hidden_size", [None, 8])
def test_refuses_an_encoder_decoder(depths, hidden_size):
    config = BartConfig(encoder_layers=depths[0], decoder_layers=depths[1], **BART)
    message = "BartForConditionalGeneration is an encoder-decoder, of which num_layers would shorten one side; build"
    with pytest.raises(ValueError, match=message):
        student_from_teacher(BartForConditionalGeneration(config), 2, hidden_size=hidden_size)


def test_refuses_a_model_whose_depth_stands_elsewhere():
    teacher = BartForCausalLM(BartConfig(encoder_layers=4, decoder_layers=4, **BART))
    with pytest.raises(ValueError, match="num_hidden_layers = 2 gives a BartForCausalLM of 4 layers; build"):
        student_from_teacher(teacher, 2)


def test_the_student_built_by_hand():
    """As the message says."""
    teacher = BartForConditionalGeneration(BartConfig(encoder_layers=4, decoder_layers=4, **BART))
    student = type(teacher)(BartConfig(encoder_layers=2, decoder_layers=2, **BART))
    shared = {key: value for key, value in teacher.state_dict().items() if key in student.state_dict()}
    student.load_state_dict(shared)
    assert torch.equal(student.model.decoder.layers[1].fc1.weight, teacher.model.decoder.layers[1].fc1.weight)
