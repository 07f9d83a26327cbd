"""What HiddenStates does around the forward: layers, masks, errors, checkpointing, compilation, memory."""

import contextlib
import weakref
from collections import namedtuple

import pytest
import torch
from tiny_models import BATCH, LAYERS, TOKENS, WIDTH, make_batch, make_model, transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from alpkd_fast import alp_loss
from alpkd_fast.capture import HiddenStates

POOLINGS = ["token", "cls", "last", "mean"]


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def step(model, pooling, batch=None, call=None, around=HiddenStates):
    """One forward and backward on a loss of the logits and the captured rows: the rows and all gradients."""
    model.zero_grad(set_to_none=True)
    with around(model, pooling=pooling) as capture:
        output = (call or model)(**(batch or make_batch()))
        rows = capture.take()
    (output.logits.square().sum() + sum(r.pow(3).sum() for r in rows)).backward()
    return [r.detach() for r in rows], [p.grad for p in model.parameters()]


def assert_same(got, expected, **tolerance):
    for mine, theirs in zip(got, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, **tolerance)


class TestTake:
    def test_needs_a_forward(self):
        model, batch = make_model("bert"), make_batch()
        model(**batch)
        with HiddenStates(model) as capture:
            with pytest.raises(RuntimeError, match="no forward of BertModel ran"):
                capture.take()
            model(**batch)
            assert len(capture.take()) == LAYERS
            with pytest.raises(RuntimeError, match="since the last take"):
                capture.take()

    def test_gives_the_last_forward_also_after_the_block(self):
        model = make_model("bert").eval()
        with torch.no_grad(), HiddenStates(model, pooling="cls") as capture:
            model(**make_batch(0))
            model(**make_batch(1))
        with torch.no_grad(), HiddenStates(model, pooling="cls") as second:
            model(**make_batch(1))
        assert_same([capture.take()], [second.take()], rtol=0, atol=0)

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_rows_of_one_model_have_one_dtype(self, pooling):
        """CUDA's autocast computes a bf16 GPT-2's final norm, and nothing else of its states, in float32."""
        model, teacher = make_model("gpt2").bfloat16(), make_model("gpt2", seed=1).eval()
        model.ln_f.register_forward_hook(lambda _, __, h: h.float())
        expected = model(**make_batch(), output_hidden_states=True).hidden_states[1:]
        assert [h.dtype for h in expected] == [torch.bfloat16, torch.bfloat16, torch.float32]
        with HiddenStates(teacher, pooling=pooling) as t, HiddenStates(model, pooling=pooling) as s:
            with torch.no_grad():
                teacher(**make_batch())
            model(**make_batch())
        rows, weights = s.take(), s.row_weights
        if pooling == "token":
            assert_same([rows], [[h.float() for h in expected]], rtol=0, atol=0)
        loss = alp_loss(rows, t.take(), weights)
        loss.backward()
        got = [p.grad for p in model.parameters()]
        model.zero_grad()
        with torch.no_grad(), HiddenStates(teacher) as t:
            teacher(**make_batch())
        widened = [h.float() for h in model(**make_batch(), output_hidden_states=True).hidden_states[1:]]
        want = alp_loss(widened, t.take(), make_batch()["attention_mask"], pooling=pooling)
        want.backward()
        torch.testing.assert_close(loss, want, rtol=0.01, atol=0)
        for a, p in zip(got, model.parameters(), strict=True):
            assert (a - p.grad).norm() <= 0.05 * p.grad.norm()

    def test_rows_of_one_dtype_are_not_copied(self):
        seen = []
        model = make_model("gpt2").bfloat16().eval()
        with torch.no_grad(), HiddenStates(model) as capture:
            model.ln_f.register_forward_hook(lambda _, __, h: seen.append(h))
            model(**make_batch())
        assert capture.take()[-1] is seen[0]

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_blocks_on_two_devices(self, pooling, monkeypatch):
        """As with device_map="auto"; the meta device computes no values, but takes no tensor of another device."""
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
        model, mask = Chain(), make_batch()["attention_mask"]
        model.second.to("meta")
        model.second.register_forward_pre_hook(lambda _, args: args[0].to("meta"))
        for given in (mask, None):
            with HiddenStates(model, ["first", "second"], pooling, "padding") as capture:
                model(torch.randn(BATCH, TOKENS, WIDTH), given)
            assert [h.device.type for h in capture.take()] == ["cpu", "meta"]

    def test_says_which_block_did_not_run(self):
        model = make_model("bert")
        model.encoder.layer[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with HiddenStates(model) as capture:
            with pytest.raises(KeyboardInterrupt):
                model(**make_batch())
            with pytest.raises(RuntimeError, match=r"encoder.layer.1 did not run"):
                capture.take()

    def test_a_part_called_alone_is_not_collected(self):
        model = make_model("bert", "ForSequenceClassification")
        with HiddenStates(model) as capture:
            model.bert(**make_batch())
            with pytest.raises(RuntimeError, match="no forward of BertForSequenceClassification"):
                capture.take()


class TestHooks:
    def test_are_removed(self):
        model = make_model("bert")
        before = hook_count(model)
        capture = HiddenStates(model)

        def fail_inside():
            with capture:
                assert hook_count(model) > before
                raise KeyError

        with pytest.raises(KeyError):
            fail_inside()
        assert hook_count(model) == before
        with capture:
            model(**make_batch())
        assert len(capture.take()) == LAYERS

    def test_nested_use_of_one_object_fails(self):
        with HiddenStates(make_model("bert")) as capture, pytest.raises(RuntimeError, match="active already"):
            capture.__enter__()

    def test_two_captures_of_one_model(self):
        model, batch = make_model("bert", "ForSequenceClassification"), make_batch()
        with HiddenStates(model, pooling="cls") as a, HiddenStates(model, pooling="mean") as b:
            output = model(**batch)
            loss = sum(r.pow(3).sum() for r in [*a.take(), *b.take()]) + output.logits.square().sum()
        loss.backward()
        both = [p.grad.clone() for p in model.parameters()]
        one, two = step(model, "cls", batch)[1], step(model, "mean", batch)[1]
        model.zero_grad()
        model(**batch).logits.square().sum().backward()
        expected = [x + y - p.grad for x, y, p in zip(one, two, model.parameters(), strict=True)]
        for got, want in zip(both, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class TestLayers:
    def test_indices(self):
        model, batch = make_model("gpt2").eval(), make_batch()
        with torch.no_grad(), HiddenStates(model) as full, HiddenStates(model, layers=[-1, 0]) as chosen:
            model(**batch)
        states, (last, first) = full.take(), chosen.take()
        assert list(chosen.blocks) == ["ln_f", "h.0"]
        assert torch.equal(last, states[-1])
        assert torch.equal(first, states[0])

    def test_names(self):
        model, batch = make_model("bert").eval(), make_batch()
        names = ["encoder.layer.2", "encoder.layer.0.attention.output"]
        with torch.no_grad(), HiddenStates(model, names) as capture, HiddenStates(model) as full:
            model(**batch)
        block, attention = capture.take()
        assert torch.equal(block, full.take()[2])
        assert attention.shape == (BATCH, TOKENS, WIDTH)

    @pytest.mark.parametrize(
        ("layers", "error", "message"),
        [
            ([], ValueError, "layers: got none"),
            ([0, 3], ValueError, "index 3, the model has 3 blocks"),
            ([0, -3], ValueError, "'encoder.layer.0' a second time"),
            ([0, "pooler"], TypeError, "either block indices or module names"),
            (["layer.0"], ValueError, "did you mean 'encoder.layer.0'"),
            (["nonsense"], ValueError, "named_modules"),
        ],
    )
    def test_errors(self, layers, error, message):
        with pytest.raises(error, match=message):
            HiddenStates(make_model("bert"), layers)

    def test_a_block_that_runs_three_times(self):
        config = transformers.AlbertConfig(
            vocab_size=50, embedding_size=8, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=24,
        )  # fmt: skip
        model, batch = transformers.AlbertModel(config).eval(), make_batch()
        with pytest.raises(ValueError, match=r"pass layers=\[module names"):
            HiddenStates(model)
        with torch.no_grad(), HiddenStates(model, ["encoder.albert_layer_groups.0"]) as capture:
            expected = model(**batch, output_hidden_states=True).hidden_states[1:]
        assert_same([capture.take()], [expected], rtol=0, atol=0)

    def test_encoder_and_decoder_have_to_be_told_apart(self):
        config = transformers.T5Config(vocab_size=50, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        model = transformers.T5Model(config).eval()
        with pytest.raises(ValueError, match=r"'encoder.block', 'decoder.block'"):
            HiddenStates(model)
        with HiddenStates(model, ["encoder.block.0", "encoder.final_layer_norm"]) as capture:
            output = model(**make_batch(), decoder_input_ids=torch.ones(BATCH, 2, dtype=torch.int64))
        assert torch.equal(capture.take()[1], output.encoder_last_hidden_state)

    def test_data_parallel_is_refused(self):
        with pytest.raises(ValueError, match="use DistributedDataParallel"):
            HiddenStates(nn.DataParallel(make_model("bert")))


Pair = namedtuple("Pair", "state extra")
WRAP = {
    "tensor": lambda h: h,
    "tuple": lambda h: (h, 1),
    "list": lambda h: [h, 1],
    "namedtuple": lambda h: Pair(h, 1),
    "dict": lambda h: {"state": h, "extra": 1},
    "model_output": lambda h: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=h),
}


class Block(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(WIDTH, WIDTH), wrap

    def forward(self, h):
        return self.wrap(torch.tanh(self.linear(h)))


class Chain(nn.Module):
    """Any module at all: blocks with outputs of some kind, a mask of another name, perhaps checkpointed."""

    def __init__(self, kind="tensor", checkpointed=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Block(WRAP[kind]), Block(WRAP[kind])
        self.types, self.checkpointed = [], checkpointed

    def forward(self, x, padding=None):
        for block in (self.first, self.second):
            x = block(x) if self.checkpointed is None else checkpoint(block, x, use_reentrant=self.checkpointed)
            if not torch.compiler.is_compiling():
                self.types.append(type(x))
            if not isinstance(x, torch.Tensor):
                x = next(iter(x.values())) if hasattr(x, "values") else x[0]
        return x


class TestOutputs:
    @pytest.mark.parametrize("kind", WRAP)
    def test_of_any_kind(self, kind):
        x = torch.randn(BATCH, TOKENS, WIDTH)
        model, plain = Chain(kind), Chain()
        with HiddenStates(model, ["first", "second"], "cls") as capture:
            out = model(x)
        first, second = capture.take()
        (out.square().sum() + first.sum() + second.pow(3).sum()).backward()
        h1 = plain.first(x)
        h2 = plain.second(h1)
        (h2.square().sum() + h1[:, 0].sum() + h2[:, 0].pow(3).sum()).backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        assert model.types == [type(WRAP[kind](x))] * 2

    def test_without_a_tensor(self):
        model = Chain()
        model.first.wrap = lambda h: (None, h)
        with HiddenStates(model, ["first"]), pytest.raises(TypeError, match="a block returned NoneType"):
            model(torch.randn(BATCH, TOKENS, WIDTH))


class TestMask:
    def rows(self, model, *args, pooling="mean", mask="attention_mask", layers=None, **kwargs):
        with torch.no_grad(), HiddenStates(model, layers, pooling, mask) as capture:
            model(*args, **kwargs)
        return capture.take(), capture.row_weights

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_by_keyword_by_position_and_given(self, pooling):
        model, batch = make_model("bert").eval(), make_batch()
        ids, mask = batch["input_ids"], batch["attention_mask"]
        expected, weights = self.rows(model, **batch, pooling=pooling)
        for rows, other in (
            self.rows(model, ids, mask, pooling=pooling),
            self.rows(model, **batch, pooling=pooling, mask=mask.clone()),
        ):
            assert_same([rows], [expected], rtol=0, atol=0)
            assert torch.equal(weights, other)

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_none_counts_every_token(self, pooling):
        model, ids = make_model("bert").eval(), make_batch()["input_ids"]
        rows, weights = self.rows(model, ids, pooling=pooling)
        expected, ones = self.rows(model, ids, torch.ones_like(ids), pooling=pooling)
        assert_same([rows], [expected], rtol=1e-5, atol=1e-6)
        assert weights is None
        assert bool((ones == 1).all())

    def test_of_another_name(self):
        x, padding = torch.randn(BATCH, TOKENS, WIDTH), make_batch()["attention_mask"]
        (rows,), _ = self.rows(Chain(), x, padding, layers=["first"], mask="padding")
        h = Chain().first(x).detach()
        torch.testing.assert_close(rows[2], h[2, :3].mean(0))
        with pytest.raises(ValueError, match=r"no argument 'mask'; it has x, padding"):
            HiddenStates(Chain(), ["first"], attention_mask="mask")

    def test_of_a_wrong_shape(self):
        model, batch = make_model("bert"), make_batch()
        with pytest.raises(ValueError, match=r"attention_mask: got \(4, 1, 1, 7\).*\(4, 7\)"):
            self.rows(model, batch["input_ids"], batch["attention_mask"][:, None, None].float())

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_fractional_and_empty(self, pooling):
        model, batch = make_model("bert").eval(), make_batch()
        mask = torch.tensor([[0.5, 1, 0.25, 0, 0, 0, 2], [0] * 7, [1] * 7, [0, 0, 3, 0, 0, 0, 0]])
        rows, weights = self.rows(model, **batch, pooling=pooling, mask=mask)
        states = model(**batch, output_hidden_states=True).hidden_states[1:]
        zeros = [torch.zeros_like(r) for r in rows]
        expected = alp_loss([torch.zeros_like(h) for h in states], states, mask, pooling=pooling)
        torch.testing.assert_close(alp_loss(zeros, rows, weights), expected)

    def test_pooling_name(self):
        with pytest.raises(ValueError, match="pooling: got 'max'"):
            HiddenStates(make_model("bert"), pooling="max")


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("pooling", POOLINGS)
    @pytest.mark.parametrize("name", ["bert", "llama"])
    def test_of_transformers(self, name, pooling, reentrant):
        model = make_model(name, "ForSequenceClassification").double()
        expected = step(model, pooling)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same(step(model, pooling), expected)

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_of_blocks(self, pooling):
        x, results = torch.randn(BATCH, TOKENS, WIDTH), []
        for checkpointed in (None, False):
            model = Chain(checkpointed=checkpointed)
            with HiddenStates(model, ["first", "second"], pooling) as capture:
                out = model(x)
                rows = capture.take()
                # another forward before the backward: the recomputation must neither use nor disturb it
                model(x[:, :2], None)
                (out.square().sum() + sum(r.pow(3).sum() for r in rows)).backward()
                assert capture.take()[0].shape[0] == BATCH
            results.append((rows, [p.grad for p in model.parameters()]))
        assert_same(results[1], results[0])

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_of_blocks_that_hides_gradients_fails(self, pooling):
        model = Chain(checkpointed=True)
        with HiddenStates(model, ["first"], pooling) as capture:
            out = model(torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True))
            rows = capture.take()
            with pytest.raises(RuntimeError, match="pass use_reentrant=False"):
                (out.sum() + rows[0].sum()).backward()

    def test_of_the_whole_model(self):
        model = make_model("bert", "ForSequenceClassification")
        expected = step(model, "mean")
        assert_same(step(model, "mean", call=lambda **batch: checkpoint(model, **batch, use_reentrant=False)), expected)


class TestTraining:
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_gradient_accumulation(self, pooling):
        model = make_model("bert", "ForSequenceClassification").double()
        teacher = make_model("bert", seed=1).double().eval()
        whole = make_batch()
        rows_in_all = whole["attention_mask"].sum() if pooling == "token" else BATCH

        def backward(batches):
            model.zero_grad()
            with HiddenStates(teacher, pooling=pooling) as t, HiddenStates(model, pooling=pooling) as s:
                for batch in batches:
                    with torch.no_grad():
                        teacher(**batch)
                    model(**batch)
                    alp_loss(s.take(), t.take(), s.row_weights, normalizer=rows_in_all).backward()
            return [p.grad for p in model.parameters()]

        parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 1), slice(1, 4))]
        assert_same([backward(parts)], [backward([whole])], rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_autocast(self, pooling):
        model = make_model("bert", "ForSequenceClassification")
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16), HiddenStates(model, pooling=pooling) as capture:
            output = model(**make_batch())
        rows = capture.take()
        (output.logits.float().square().sum() + sum(r.float().pow(3).sum() for r in rows)).backward()
        got = [p.grad for p in model.parameters()]
        expected = step(model, pooling)[1]
        for a, b in zip(got, expected, strict=True):
            assert (a - b).norm() <= 0.1 * b.norm() + 1e-3

    def test_teacher_in_inference_mode(self):
        teacher, student = make_model("bert", seed=1), make_model("bert")
        with HiddenStates(teacher, pooling="cls") as t, HiddenStates(student, pooling="cls") as s:
            with torch.inference_mode():
                teacher(**make_batch())
            student(**make_batch())
        alp_loss(s.take(), t.take(), s.row_weights).backward()
        assert student.embeddings.word_embeddings.weight.grad.norm() > 0

    def test_frozen_lower_blocks(self):
        model = make_model("bert", "ForSequenceClassification")
        for p in [*model.bert.embeddings.parameters(), *model.bert.encoder.layer[0].parameters()]:
            p.requires_grad_(False)
        rows, gradients = step(model, "cls")
        assert len(rows) == LAYERS
        assert sum(g is not None for g in gradients) == sum(p.requires_grad for p in model.parameters())


class TestCompile:
    @pytest.mark.parametrize("pooling", ["token", "mean"])
    def test_in_one_graph(self, pooling):
        model = make_model("bert", "ForSequenceClassification")
        expected = step(model, pooling)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with HiddenStates(compiled, pooling=pooling) as capture:
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                output, rows = compiled(**make_batch()), capture.take()
                (output.logits.square().sum() + sum(r.pow(3).sum() for r in rows)).backward()
        assert_same(([r.detach() for r in rows], [p.grad for p in model.parameters()]), expected)

    def chain_step(self, model, pooling, compile_it=None):
        """The second step's rows and gradients, of a chain that runs as it is or compiled."""
        torch.compiler.reset()
        x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
        call = compile_it(model) if compile_it else model
        with HiddenStates(model, ["first", "second"], pooling) as capture:
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                out, rows = call(x), capture.take()
                (out.square().sum() + sum(r.pow(3).sum() for r in rows)).backward()
        return [r.detach() for r in rows], [p.grad for p in model.parameters()]

    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    def test_by_inductor(self, pooling):
        got = self.chain_step(Chain(), pooling, lambda model: torch.compile(model, fullgraph=True))
        assert_same(got, self.chain_step(Chain(), pooling))

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_by_inductor_under_checkpointing(self, pooling):
        """The compiler breaks the graph at checkpointed blocks, and refuses where it may not."""
        got = self.chain_step(Chain(checkpointed=False), pooling, torch.compile)
        assert_same(got, self.chain_step(Chain(), pooling))
        with pytest.raises(torch._dynamo.exc.Unsupported, match="checkpoint"):
            self.chain_step(Chain(checkpointed=False), pooling, lambda model: torch.compile(model, fullgraph=True))

    def test_compiled_too_early_is_an_error(self):
        torch.compiler.reset()
        model = torch.compile(Chain(), backend="aot_eager")
        x = torch.randn(BATCH, TOKENS, WIDTH)
        model(x)
        with HiddenStates(model, ["first"]) as capture:
            model(x)
            with pytest.raises(RuntimeError, match=r"torch.compiler.reset\(\)"):
                capture.take()
            torch.compiler.reset()
            model(x)
            assert len(capture.take()) == 1


@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
def test_a_frozen_teachers_tokens_are_freed(pooling):
    teacher, alive, most = make_model("bert"), [], []

    def watch(_, __, output):
        h = output[0] if isinstance(output, tuple) else output
        alive.append(weakref.ref(h.untyped_storage()))
        most.append(sum(ref() is not None for ref in alive))

    for block in teacher.encoder.layer:
        block.register_forward_hook(watch)
    with torch.no_grad(), HiddenStates(teacher, pooling=pooling) as capture:
        teacher(**make_batch())
        rows = capture.take()
    assert [r.untyped_storage().nbytes() for r in rows] == [BATCH * WIDTH * 4] * LAYERS
    assert all(ref() is None for ref in alive)
