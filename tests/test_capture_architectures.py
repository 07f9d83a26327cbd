"""Captured hidden states equal transformers' own, and their gradients those of plain autograd."""

import pytest
import torch
from tiny_models import CONFIGS, FINAL_NORM, LAYERS, OTHERS, make_batch, make_model, transformers

from alpkd_fast import alp_loss
from alpkd_fast.capture import HiddenStates

HEADS = ("", "ForSequenceClassification", "ForTokenClassification")


def expected_rows(model, batch):
    return model(**batch, output_hidden_states=True).hidden_states[1:]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_equal_output_hidden_states(name, head):
    model, batch = make_model(name, head), make_batch()
    with torch.no_grad(), HiddenStates(model) as capture:
        model(**batch)
        rows = capture.take()
        assert_same(rows, expected_rows(model, batch))
    assert len(rows) == LAYERS
    assert torch.equal(capture.row_weights, batch["attention_mask"])


@pytest.mark.parametrize("name", OTHERS)
def test_tokens_of_other_architectures(name):
    model, batch = make_model(name, OTHERS[name][2]), make_batch()
    with torch.no_grad(), HiddenStates(model) as capture:
        expected = expected_rows(model, batch)
    assert_same(capture.take(), expected)


def test_an_encoder_alone():
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=LAYERS, num_heads=2)
    model, batch = transformers.T5EncoderModel(config).eval(), make_batch()
    with torch.no_grad(), HiddenStates(model) as capture:
        expected = expected_rows(model, batch)
    assert_same(capture.take(), expected)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vit", {"image_size": 8, "patch_size": 4}),  # its ``layernorm`` is not part of the last hidden state
        ("wav2vec2", {"conv_dim": [8], "conv_kernel": [4], "conv_stride": [4]}),  # ``layer_norm`` before the blocks
    ],
)
def test_a_norm_that_is_not_the_last_ones(kind, options):
    small = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **small, **options)).eval()
    shape = (2, 3, 8, 8) if kind == "vit" else (2, 64)
    with torch.no_grad(), HiddenStates(model) as capture:
        expected = model(torch.randn(shape), output_hidden_states=True).hidden_states[1:]
    assert_same(capture.take(), expected)


@pytest.mark.parametrize("name", FINAL_NORM)
def test_raw_block_output(name):
    model, batch = make_model(name), make_batch()
    with torch.no_grad(), HiddenStates(model, final_norm=False) as raw, HiddenStates(model) as normed:
        model(**batch)
        last, after_norm = raw.take()[-1], normed.take()[-1]
    owner, norm_name = list(normed.blocks)[-1].rpartition(".")[::2]
    norm = model.get_submodule(owner).get_submodule(norm_name) if owner else model.get_submodule(norm_name)
    torch.testing.assert_close(norm(last), after_norm, rtol=0, atol=0)
    assert not torch.equal(last, after_norm)


@pytest.mark.parametrize("pooling", ["token", "cls", "last", "mean"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_those_of_output_hidden_states(name, pooling):
    head = "ForSequenceClassification"
    teacher, student = make_model(name, head, seed=1).double(), make_model(name, head, seed=2).double()
    batch = make_batch()

    with torch.no_grad():
        teacher_states = expected_rows(teacher, batch)
    output = student(**batch, output_hidden_states=True)
    expected = alp_loss(
        output.hidden_states[1:], teacher_states, batch["attention_mask"], pooling=pooling, backend="reference"
    )
    (output.logits.square().sum() + expected).backward()
    expected_gradients = {key: p.grad for key, p in student.named_parameters()}

    student.zero_grad(set_to_none=True)
    with HiddenStates(teacher, pooling=pooling) as t, HiddenStates(student, pooling=pooling) as s:
        with torch.no_grad():
            teacher(**batch)
        output = student(**batch)
    loss = alp_loss(s.take(), t.take(), s.row_weights)
    (output.logits.square().sum() + loss).backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for key, p in student.named_parameters():
        if expected_gradients[key] is None:
            assert p.grad is None, key
        else:
            torch.testing.assert_close(p.grad, expected_gradients[key], rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_left_padding(pooling):
    model, batch = make_model("llama"), make_batch(left_padding=True)
    with torch.no_grad(), HiddenStates(model, pooling=pooling) as pooled, HiddenStates(model) as tokens:
        model(**batch)
    rows, states = pooled.take(), tokens.take()
    full = alp_loss([torch.zeros_like(h) for h in states], states, batch["attention_mask"], pooling=pooling)
    loss = alp_loss([torch.zeros_like(h) for h in rows], rows, pooled.row_weights)
    torch.testing.assert_close(loss, full, rtol=1e-6, atol=0)
