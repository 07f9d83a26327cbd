"""The runs of a sweep: one student and one JSON each, in one process."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback, set_seed

from ..hf.config import DistillationConfig
from ..hf.students import student_from_teacher
from ..hf.teacher_cache import ROW_COLUMN, TeacherCache
from ..hf.trainer import DistillationTrainer
from ..info import report as environment
from .callbacks import CheckpointOnInterrupt, ProgressBar
from .report import write_json
from .runs import check_settings, plain
from .training import final_score, load_model, load_work, score, training_arguments

NOT_SETTINGS = ("methods", "depths", "seeds", "output", "resamples")  # these may change from call to call


class Sweep:
    """A sweep's data and teacher, and the folder of its runs.

    Raises:
        ValueError: the folder was begun with other settings, or the data, teacher, depths or methods do not fit.
    """

    def __init__(
        self, args: argparse.Namespace, layers: str | list[int], methods: dict[str, DistillationConfig]
    ) -> None:
        self.args, self.layers, self.output = args, layers, Path(args.output)
        settings = plain(args, without=NOT_SETTINGS)
        check_settings(self.output / "sweep.json", settings)
        self.work = load_work(args, args.teacher)
        self.teacher = load_model(args.teacher, self.work, new_head=False)
        for depth in args.depths:
            if not 1 <= depth <= (deepest := self.teacher.config.num_hidden_layers):
                raise ValueError(f"--depths: got {depth}; allowed are 1 to the teacher's {deepest}")
        self._cache = None if self.work.task.kind == "mlm" else TeacherCache()
        for number, row in enumerate(self.work.train):
            row[ROW_COLUMN] = number
        self._check(methods)
        self._begin(settings)

    def _check(self, methods: dict[str, DistillationConfig]) -> None:
        """Refuse a method that does not fit a depth now, not after the runs before it."""
        with tempfile.TemporaryDirectory() as folder:
            for depth in self.args.depths:
                student = self._student(depth)
                for method, config in methods.items():
                    try:
                        self._trainer(student, config, Path(folder), seed=0)
                    except ValueError as error:
                        raise ValueError(f"--methods: {method} at depth {depth}: {error}") from error

    def _student(self, depth: int) -> PreTrainedModel:
        return student_from_teacher(self.teacher, depth, self.layers, hidden_size=self.args.hidden_size)

    def _trainer(
        self, student: PreTrainedModel, config: DistillationConfig, folder: Path, seed: int, **more: Any
    ) -> DistillationTrainer:
        return DistillationTrainer(
            student,
            self.teacher,
            distillation=config,
            teacher_cache=None if config.pooling == "token" else self._cache,
            args=training_arguments(self.args, folder, seed, save_steps=None),
            train_dataset=self.work.train,
            data_collator=self.work.collator,
            processing_class=self.work.tokenizer,
            **more,
        )

    def _begin(self, settings: dict[str, Any]) -> None:
        (self.output / "runs").mkdir(parents=True, exist_ok=True)
        path = self.output / "sweep.json"
        if path.exists():
            return
        metrics, predictions = score(self.teacher, self.work)
        labels = [row.get("labels") for row in self.work.validation] if predictions else []
        teacher = {"metrics": metrics, "predictions": predictions}
        write_json(path, {"settings": settings, "environment": environment(), "teacher": teacher, "labels": labels})

    def train(self, method: str, config: DistillationConfig, depth: int, seed: int, title: str) -> bool:
        """Train one student and write its JSON, if that is not there; False where Ctrl-C came first."""
        path = run_path(self.output, method, depth, seed)
        if path.exists():
            return True
        set_seed(seed)
        student = self._student(depth)
        interrupt = CheckpointOnInterrupt(save=False)
        with tempfile.TemporaryDirectory() as folder:  # the Trainer wants one, but nothing is saved
            callbacks = [interrupt, ProgressBar(title, Console())]
            trainer = self._trainer(student, config, Path(folder), seed, callbacks=callbacks)
            trainer.remove_callback(PrinterCallback)
            started = time.perf_counter()
            try:
                trainer.train()
            finally:
                interrupt.restore()
        if interrupt.interrupted:
            return False
        seconds = time.perf_counter() - started
        metrics, predictions = final_score(trainer, self.work)
        logs = [row for row in trainer.state.log_history if "loss" in row]
        attention = trainer.layer_attention
        result = {
            "distillation": config.to_dict(),
            "depth": depth,
            "seed": seed,
            "metrics": metrics,
            "predictions": predictions,
            "train_seconds": seconds,
            "steps": trainer.state.global_step,
            "last_log": logs[-1],
            "layer_attention": None if attention is None else attention.tolist(),
        }
        write_json(path, result)
        return True


def run_path(output: Path, method: str, depth: int, seed: int) -> Path:
    name = method.replace(":", "--").replace("=", "-").replace(",", "--")
    return output / "runs" / f"{name}_depth{depth}_seed{seed}.json"
