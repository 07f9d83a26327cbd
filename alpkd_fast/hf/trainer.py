"""DistillationTrainer: the Trainer of transformers with a teacher and the loss on hidden states."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import enable_full_determinism, set_seed

from ..api import ALPOutput
from ..capture import HiddenStates
from ..capture.blocks import unwrap
from ..module import ALPLoss
from .config import DistillationConfig
from .heads import check_model, check_shared, default_pooling, model_class, predicts_tokens
from .inputs import accepted, attention_mask, check_decoder_inputs, count_rows, input_names
from .log import StepLog
from .losses import OTHER_TASKS, check_labels, hard_loss, soft_loss, target_mask
from .methods import epoch_layer_map
from .sampling import LengthGroupedTrainer
from .teacher_cache import ROW_COLUMN, Outputs, TeacherCache
from .teacher_parts import Inputs, Rows, run_in_parts, whole_outputs

LOSS_NAME = "alp_loss"  # the student's submodule that holds what the loss learns
LOSS_FILE = "alp_loss.safetensors"
ATTENTION = "layer_attention"


class _FreshLog(TrainerCallback):
    """Drops what a run left that was interrupted, or that starts over with smaller batches."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._log = StepLog()


class DistillationTrainer(LengthGroupedTrainer):
    """Trains a student on labels, on a teacher's logits and on its hidden states.

    Args:
        model: the student, a transformers model of text whose head gives logits: sequence and token classification,
            masked and causal language models; multiple choice and encoder-decoders with method "kd". With
            ``ce_weight=0`` and ``kd_weight=0`` any head, or none.
        teacher: a model that takes the same tokens and gives logits of the same shape. It is frozen, set to eval,
            and moved to the device.
        distillation: the losses and their options.
        teacher_cache: reuse the teacher's outputs for rows seen before; the training data then needs a column "row"
            of row numbers. Not for pooling "token", nor for the logits of models that predict tokens.
        **trainer_arguments: everything else that ``transformers.Trainer`` takes.

    Gradients do not depend on how a global batch is cut into accumulation steps and ranks: every loss is divided by
    its count over all of them. Evaluation is the Trainer's own. What is saved is the plain student; what the
    loss learns (projection, scale) lies beside it in ``alp_loss.safetensors`` and is taken up on resume.

    Logged, as means over the optimizer steps since the last log: ``ce``, ``kd``, ``alp``, ``alp_layer_{i}`` (each
    student layer's share of ``alp``) and ``alp_entropy_{i}`` (entropy of its attention, in nats).

    Attributes:
        layer_attention: (m, n) mean attention of the last logged interval, or None before.

    Raises:
        ValueError, TypeError: models that do not fit each other or the options; the message says which and the remedy.
    """

    model: Any  # transformers allows None

    # compute_loss divides by the counts of the whole accumulated batch, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher: PreTrainedModel | None = None,
        args: Any = None,
        *,
        distillation: DistillationConfig | None = None,
        teacher_cache: TeacherCache | None = None,
        **trainer_arguments: Any,
    ) -> None:
        if teacher is None:
            raise ValueError("teacher: got None; pass a transformers model that is trained for the task")
        if trainer_arguments.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func: got a function; the training loss is the one that DistillationConfig describes; "
                "leave it out and set ce_weight, kd_weight and alp_weight, or override compute_loss in a subclass"
            )
        if distillation is not None and not isinstance(distillation, DistillationConfig):
            raise TypeError(
                f"distillation: got {type(distillation).__name__}; pass DistillationConfig(**options), "
                "which takes the same names"
            )
        self.distillation = distillation or DistillationConfig()
        self.teacher: Any = teacher
        self._teacher_cache = teacher_cache
        self.layer_attention: Tensor | None = None
        self._log = StepLog()
        if model is not None:
            # As the Trainer does ahead of a model_init: φ's start depends on the seed, not on what was drawn before.
            args = TrainingArguments("tmp_trainer") if args is None else args
            enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
            self._attach(model)
        super().__init__(model=model, args=args, **trainer_arguments)
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process (nn.DataParallel) are not supported; start one process per GPU: "
                "torchrun --nproc_per_node=GPUS, or accelerate launch"
            )
        self._check_optimizer()
        self.add_callback(_FreshLog(self))
        self.teacher = self._frozen(teacher)
        self._student_inputs = input_names(self.model)
        self._teacher_inputs = input_names(teacher)

    @property
    def attended_layers(self) -> list[int]:
        """The student layers that take part in the loss on hidden states, in the order of ``layer_attention``."""
        return self._student_layers if self.distillation.uses_hidden_states else []

    def call_model_init(self, trial: Any = None) -> Any:
        return self._attach(super().call_model_init(trial))

    def _frozen(self, teacher: Any) -> Any:
        """Not prepared by Accelerate, which would wrap the forward of the caller's teacher anew for each trainer."""
        teacher.eval().requires_grad_(False)
        if not self.accelerator.verify_device_map(teacher):  # else it lies on several devices
            teacher.to(self.args.device)
        if self.args.torch_compile and unwrap(teacher)[0] is teacher:
            return torch.compile(teacher, **self.accelerator.state.dynamo_plugin.to_kwargs())
        return teacher

    def _check_optimizer(self) -> None:
        """An optimizer that was made ahead of the trainer cannot know what the loss learns."""
        module = getattr(self.model, LOSS_NAME, None)
        if self.optimizer is None or module is None:
            return
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in module.named_parameters() if id(p) not in known]
        if missing:
            raise ValueError(
                f"optimizers: the optimizer that was passed does not hold what the loss learns ({', '.join(missing)}), "
                "which the trainer makes; pass the class instead, as with "
                'optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}), or override create_optimizer in a subclass'
            )

    def _attach(self, student: Any) -> Any:
        """Give the student the loss module, so that φ is wrapped, optimised and moved with it."""
        options, teacher = self.distillation, self.teacher
        wrapped = unwrap(student)[0] is not student
        if wrapped:
            raise ValueError(
                f"model: got a student inside {type(student).__name__}; pass the student itself, and "
                "torch_compile=True to TrainingArguments to have it compiled"
            )
        check_model("model", student, options)
        check_model("teacher", teacher, options)
        check_shared(student, teacher)
        kind, outputs = getattr(student.config, "problem_type", None), student.config.num_labels
        if options.uses_logits and (kind == "multi_label_classification" or (kind == "regression" and outputs > 1)):
            raise ValueError(
                f"model: its config.problem_type is {kind!r} with {outputs} outputs; allowed are classification into "
                f"one class, and regression with one output. {OTHER_TASKS}"
            )
        self._predicts_tokens = predicts_tokens(student)
        self.pooling = options.pooling or default_pooling(student)
        if self._teacher_cache is not None and options.uses_logits and self._predicts_tokens:
            raise ValueError(
                f"teacher_cache: got one, but {model_class(student).__name__} predicts tokens, whose logits are not "
                "kept; leave it out, or set ce_weight=0 and kd_weight=0"
            )
        if self._teacher_cache is not None and options.uses_hidden_states and self.pooling == "token":
            raise ValueError('teacher_cache: pooling "token" would keep every token of the data; use another pooling')
        student._modules.pop(LOSS_NAME, None)  # of an earlier run, else optimised and saved with this one
        if not options.uses_hidden_states:
            return student
        chosen = _chosen("student_layers", options.student_layers, student.config.num_hidden_layers)
        self._teacher_layers = _chosen("teacher_layers", options.teacher_layers, teacher.config.num_hidden_layers)
        self._student_layers = chosen[:-1] if options.drops_last_layer else chosen
        m = len(self._student_layers)
        if m == 0:
            raise ValueError(
                f"method {options.method!r} leaves the last student layer out, and the student has no other; set "
                "drop_last_layer=False (--no-drop-last-layer), or give it more layers"
            )
        if len(self._layer_map(epoch=0)) != m:  # also refuses a map that the depths do not allow
            raise ValueError(
                f"layer_map: got {len(self._layer_map(epoch=0))} rows, but {m} student layers take part; pass one list "
                "of teacher layers for each"
            )
        student_dim, teacher_dim = student.config.hidden_size, teacher.config.hidden_size
        projection = options.projection
        if projection == "none" and student_dim != teacher_dim:
            raise ValueError(
                f'projection="none": the student is {student_dim} wide, the teacher {teacher_dim}; use "shared" or '
                '"per-layer"'
            )
        projected = student_dim != teacher_dim if projection == "auto" else projection != "none"
        loss = ALPLoss(
            student_dim,
            teacher_dim,
            projection=options.projected_side if projected else False,
            projections=m if projection == "per-layer" else None,
            bias=options.projection_bias,
            return_details=True,
            **options.loss_options,
        )
        student.add_module(LOSS_NAME, loss.to(student.device))
        # save_pretrained leaves these out: what is saved is the plain student.
        ignored = {f"{LOSS_NAME}.{name}" for name in loss.state_dict()}
        student._keys_to_ignore_on_save = set(student._keys_to_ignore_on_save or ()) | ignored
        return student

    def _layer_map(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        options = self.distillation
        layer_map = options.resolved_layer_map
        assert layer_map is not None
        m = len(self._student_layers) + options.drops_last_layer
        return epoch_layer_map(layer_map, m, len(self._teacher_layers), options.drops_last_layer, options.seed, epoch)

    # ---- one optimizer step: its batches and their counts ----

    def get_batch_samples(self, epoch_iterator: Iterator[Inputs], num_batches: int, device: Any) -> Any:
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self._log.begin(len(batches), num_batches)
        return batches, self._global_counts(batches)

    def _global_counts(self, batches: list[Inputs]) -> Tensor:
        """(2,) labelled targets, and rows of the loss on hidden states, over these batches on all ranks."""
        counts = torch.zeros(2, device=self.args.device)
        for batch in batches:
            mask = attention_mask(batch)
            counts += torch.stack([self._targets(batch, mask)[1].sum(), count_rows(mask, self.pooling)]).to(counts)
        total: Tensor = self.accelerator.reduce(counts, "sum")
        return total.clamp_min(1.0)

    def _targets(self, batch: Inputs, mask: Tensor) -> tuple[Tensor | None, Tensor]:
        """Labels aligned with the logits, or None; and which targets count."""
        labels = batch.get("labels")
        if labels is None:
            return None, mask != 0 if self._predicts_tokens else torch.ones_like(mask[:, 0], dtype=torch.bool)
        if self._loss_shifts_labels:  # position s predicts label s + 1
            labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return labels, target_mask(labels)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Without the scale's logarithm: decay would pull the scale to 1."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(f"{LOSS_NAME}.log_scale")]

    # ---- the loss ----

    def compute_loss(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        check_decoder_inputs(self.model, inputs)
        counts = self._global_counts([inputs]) if num_items_in_batch is None else num_items_in_batch
        mask = attention_mask(inputs)
        labels, counted = self._targets(inputs, mask)
        outputs, teacher_logits, alp = self._run_models(model, inputs, mask, counts[1])
        if teacher_logits is None:
            loss = _zero(outputs)
        else:
            loss = self._logit_loss(outputs["logits"], teacher_logits, labels, counted, counts[0])
        if alp is not None:
            loss = loss + self.distillation.alp_weight * alp
        # Ranks average their gradients, but each holds its share of one global sum.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _teacher_outputs(self, inputs: Inputs) -> Outputs:
        """Of the whole batch, from the cache where there is one."""
        batch, size = len(attention_mask(inputs)), self.distillation.teacher_batch_size
        compute = partial(whole_outputs, self._run_teacher, inputs, batch, size)
        if self._teacher_cache is None:
            return compute()
        options = self.distillation
        layers = (self.pooling, *self._teacher_layers) if options.uses_hidden_states else None
        return self._teacher_cache.get((options.uses_logits, layers), inputs[ROW_COLUMN], compute)

    def _token_part(self, batch: int) -> int | None:
        """Sequences whose tokens of the teacher are there at a time; None for the whole batch's."""
        size = self.distillation.teacher_batch_size
        return size if self.pooling == "token" and size is not None and size < batch else None

    def _run_teacher(self, inputs: Inputs) -> Outputs:
        """Its logits, and its pooled rows, one tensor per teacher layer that takes part; None for what is not used."""
        own = accepted(inputs, self._teacher_inputs)
        if "use_cache" in self._teacher_inputs:  # all layers' keys and values; for the student the Trainer turns it off
            own["use_cache"] = False
        options = self.distillation
        with torch.no_grad(), self.accelerator.autocast():
            if not options.uses_hidden_states:
                return self.teacher(**own)["logits"], None
            with HiddenStates(self.teacher, self._teacher_layers, self.pooling) as captured:
                outputs = self.teacher(**own)
                return outputs["logits"] if options.uses_logits else None, captured.take()

    def _run_models(
        self, model: nn.Module, inputs: Inputs, mask: Tensor, rows: Tensor
    ) -> tuple[Inputs, Tensor | None, Tensor | None]:
        """The student's outputs, the teacher's logits, and the loss on hidden states; None for what is not used."""
        own = accepted(inputs, self._student_inputs)
        if not self.distillation.uses_hidden_states:
            logits, _ = self._teacher_outputs(inputs)
            return model(**own), logits, None
        student = self.accelerator.unwrap_model(model)
        module: ALPLoss = getattr(student, LOSS_NAME)
        module.options["layer_map"] = self._layer_map(int(self.state.epoch or 0))
        # The teacher runs ahead of the student, whose activations take no memory yet. Parts of tokens run after it: the
        # loss takes each part's at once, and they are freed before the next part is run.
        size = self._token_part(len(mask))
        ahead = [self._teacher_outputs(inputs)] if size is None else []
        teacher_logits: list[Tensor | None] = []
        details: list[tuple[ALPOutput, slice]] = []

        def add_loss(student: nn.Module, args: Any, outputs: Any) -> Inputs:
            layers, weights = captured.take(), captured.row_weights
            # The backward of torch.split puts the parts' gradients together, without dense zeros for each.
            parts = iter([layers]) if size is None else zip(*(h.split(size) for h in layers), strict=True)

            def use(teacher_rows: Rows, part: slice) -> None:
                part_weights = None if weights is None else weights[part]
                details.append((module(next(parts), teacher_rows, part_weights, normalizer=rows), part))

            run = self._run_teacher if size is not None else lambda _: ahead.pop()
            teacher_logits.append(run_in_parts(run, inputs, len(mask), size, use))
            tensors = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
            return {**tensors, "alp": torch.stack([output.loss for output, _ in details]).sum()}

        # Inside the student's own forward: there DDP sees φ used, and FSDP has it gathered.
        with (
            HiddenStates(student, self._student_layers, self.pooling) as captured,
            student.register_forward_hook(add_loss, prepend=True),
        ):
            outputs = model(**own)
        for output, part in details:
            self._record_details(output, mask[part], rows)
        return outputs, teacher_logits[0], outputs["alp"]

    def _logit_loss(
        self, logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, counted: Tensor, count: Tensor
    ) -> Tensor:
        options = self.distillation
        if logits.shape != teacher_logits.shape:
            raise ValueError(
                f"teacher: its logits have shape {tuple(teacher_logits.shape)}, the student's {tuple(logits.shape)}; "
                "both need the same outputs and the same tokens"
            )
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        if labels is not None:
            check_labels(logits, labels, smoothing)
        if labels is None and counted.shape != logits.shape[:-1]:
            raise ValueError(
                f"model: {model_class(self.model).__name__} gives logits {tuple(logits.shape)} for a batch without "
                f"labels; allowed are {tuple(counted.shape)} with one dimension more, of the classes. {OTHER_TASKS}"
            )
        if logits.dim() == 3:  # (B, S, V): only labelled tokens are worth a softmax over the vocabulary
            logits, teacher_logits = logits[counted], teacher_logits[counted]
            labels = None if labels is None else labels[counted]
            counted = counted[counted]
        total = logits.sum() * 0.0  # a graph even where every weight is 0, for the ranks' sake
        if options.ce_weight > 0:
            if labels is None:
                raise ValueError("ce_weight is above 0, but the batch has no labels; set ce_weight=0 to do without")
            ce = hard_loss(logits, labels, smoothing) / count
            self._log.add_loss("ce", ce)
            total = total + options.ce_weight * ce
        if options.kd_weight > 0:
            kd = soft_loss(logits, teacher_logits, counted, options.temperature) / count
            self._log.add_loss("kd", kd)
            total = total + options.kd_weight * kd
        return total

    # ---- logging ----

    def _record_details(self, output: ALPOutput, mask: Tensor, rows: Tensor) -> None:
        share = count_rows(mask, self.pooling) / rows  # of this batch in the global one
        self._log.add_loss("alp", output.loss)
        for i, layer in enumerate(self._student_layers):
            self._log.add_loss(f"alp_layer_{layer}", output.layer_losses[i])
            self._log.add_mean(f"alp_entropy_{layer}", output.entropy[i] * share)
        self._log.add_mean(ATTENTION, output.attention.flatten(1, -2).sum(1) / rows)  # (m, n)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._log and ("loss" in logs or "train_runtime" in logs):
            means = self._log.means(self.accelerator.reduce)
            self._log = StepLog()
            self.layer_attention = means.pop(ATTENTION, None)
            if "loss" in logs:
                logs.update({name: value.item() for name, value in means.items()})
        super().log(logs, start_time)

    # ---- checkpoints: the plain student, and what the loss learns beside it ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        state = self.model.state_dict() if state_dict is None else state_dict
        prefix = LOSS_NAME + "."
        learned = {k.removeprefix(prefix): v.contiguous() for k, v in state.items() if k.startswith(prefix)}
        super()._save(output_dir, state_dict)
        if learned and self.args.should_save:
            save_file(learned, Path(output_dir or str(self.args.output_dir)) / LOSS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_loss(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_loss(self.state.best_model_checkpoint)

    def _load_loss(self, folder: str | None) -> None:
        module = getattr(self.model, LOSS_NAME, None)
        # FSDP and DeepSpeed save and load the whole wrapped model, φ included.
        if module is None or not module.state_dict() or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        path = Path(folder or ".") / LOSS_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {LOSS_FILE}, but this run learns a projection or a scale; start it anew")
        module.load_state_dict(load_file(path))

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:  # keep what only the teacher takes, such as token_type_ids
            super()._set_signature_columns_if_needed()
            columns = self._signature_columns or []
            columns += [name for name in (*self._teacher_inputs, ROW_COLUMN) if name not in columns]


def _zero(outputs: Inputs) -> Tensor:
    """0 with a graph from every output: the ranks need the head's gradient even where no loss reads its output."""
    first, *others = (o.sum() for o in outputs.values() if isinstance(o, Tensor) and o.requires_grad)
    return sum(others, first) * 0.0


def _chosen(name: str, layers: list[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    if not layers or not all(0 <= i < count for i in layers):
        raise ValueError(f"{name}: got {layers}; allowed are layers 0 to {count - 1}")
    return list(layers)
