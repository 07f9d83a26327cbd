"""Distil a sequence classifier into a student of fewer layers, in a plain PyTorch loop: CE + KD + alp_loss.

    python examples/distill_glue.py                      # a small BERT on a generated task: no download, no data

That run ends with the same distillation by the command ``alpkd distill``, which needs no loop of one's own.
With a pretrained encoder DIR and a folder of GLUE tasks (TASK/train.jsonl, TASK/validation.jsonl):

    python examples/distill_glue.py --fine-tune --teacher DIR --data GLUE --task sst2 --output TEACHER
    python examples/distill_glue.py --teacher TEACHER --data GLUE --task sst2 --student-layers 4 --method kd alp

Writes to --output: each student, results.json, and attention_METHOD.png, which shows the teacher layers that each
student layer attends to.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import time
from pathlib import Path

import torch
from generated_task import make_bert, make_rows, make_tokenizer
from matplotlib.figure import Figure
from sklearn.metrics import f1_score, matthews_corrcoef
from torch.nn.functional import cross_entropy, kl_div
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alpkd_fast import alp_loss, make_layer_map
from alpkd_fast.cli.main import main as alpkd
from alpkd_fast.hf import student_from_teacher

TASKS = {  # text columns, and the metric of GLUE beside accuracy
    "rte": (("sentence1", "sentence2"), None),
    "mrpc": (("sentence1", "sentence2"), ("F1", f1_score)),
    "cola": (("sentence",), ("Matthews", matthews_corrcoef)),
    "sst2": (("sentence",), None),
}
# Options of alp_loss, and the weight of its term: such that its gradient begins in the order of that of CE + KD.
# PKD compares unit vectors, whose mean square over D columns is of the order of 1/D: hence its larger weight.
METHODS = {
    "kd": None,
    "pkd-skip": ({"layer_map": "skip", "normalize": True, "pooling": "cls"}, 1000.0),
    "alp": ({"layer_map": "all"}, 10.0),
    "alp-no": ({"layer_map": "no-overlap"}, 10.0),
    "alp-po": ({"layer_map": "partial-overlap"}, 10.0),
}
# What options are where they are not given: for a pretrained teacher, and for the generated task.
PRETRAINED = {"student_layers": 4, "epochs": 1, "train_rows": None, "batch_size": 32, "lr": 5e-5}
GENERATED = {"student_layers": 2, "epochs": 1, "train_rows": 8000, "batch_size": 64, "lr": 1e-3}
BY_COMMAND = "alp, by alpkd distill"


class Examples:
    """Tokenised rows, served in batches of similar length, so that little is padded."""

    def __init__(self, tokenizer, texts, labels, batch_size):
        """``texts``: a list of columns, one or two, each with a text per row."""
        encoded = tokenizer(*texts, truncation=True, max_length=128)
        self.rows = [{key: encoded[key][i] for key in encoded} for i in range(len(labels))]
        self.labels, self.tokenizer, self.batch_size = labels, tokenizer, batch_size

    def __len__(self):
        return -(-len(self.rows) // self.batch_size)

    def batches(self, shuffle=None):
        """Yield (model inputs, labels); ``shuffle`` is the random.Random that draws the order."""
        order = list(range(len(self.rows)))
        if shuffle:
            shuffle.shuffle(order)
        pool = 50 * self.batch_size  # long enough for lengths to match, short enough to stay random
        batches = []
        for start in range(0, len(order), pool):
            by_length = sorted(order[start : start + pool], key=lambda i: len(self.rows[i]["input_ids"]))
            batches += [by_length[k : k + self.batch_size] for k in range(0, len(by_length), self.batch_size)]
        if shuffle:
            shuffle.shuffle(batches)
        for batch in batches:
            inputs = self.tokenizer.pad([self.rows[i] for i in batch], return_tensors="pt")
            yield dict(inputs), torch.tensor([self.labels[i] for i in batch])


def read_glue(tokenizer, folder, task, split, batch_size, limit=None):
    """Read TASK/SPLIT.jsonl; with a limit, that many rows, the same ones whatever --seed is."""
    lines = (Path(folder) / task / f"{split}.jsonl").read_text(encoding="utf8").splitlines()
    if limit and limit < len(lines):
        lines = random.Random(0).sample(lines, limit)
    rows = [json.loads(line) for line in lines]
    texts = [[row[column] for row in rows] for column in TASKS[task][0]]
    return Examples(tokenizer, texts, [row["label"] for row in rows], batch_size)


def alp_options(method, teacher, student, args):
    """Options of alp_loss for a method, and the number of student layers it compares."""
    m, n = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    options = dict(METHODS[method][0], scale=args.scale)
    if args.pooling:
        options["pooling"] = args.pooling
    if method == "pkd-skip" and not args.keep_last_layer:  # PKD leaves the last layer out on both sides
        options["layer_map"] = make_layer_map("skip", m, n)[:-1]
        m -= 1
    return options, m


def distillation_loss(method, teacher, student, args):
    """The loss to minimise: CE with the labels, KL with the teacher's logits, and the method's layer loss."""
    if METHODS[method]:
        options, compared = alp_options(method, teacher, student, args)
        weight = METHODS[method][1] if args.alp_weight is None else args.alp_weight

    def loss(student, inputs, labels):
        with torch.no_grad():
            t = teacher(**inputs, output_hidden_states=True)
        s = student(**inputs, output_hidden_states=True)
        T = args.temperature
        kd = kl_div((s.logits / T).log_softmax(-1), (t.logits / T).softmax(-1), reduction="batchmean") * T**2
        total = (1 - args.kd_weight) * cross_entropy(s.logits, labels) + args.kd_weight * kd
        if METHODS[method]:  # hidden_states[0] are the embeddings
            states = s.hidden_states[1 : 1 + compared], t.hidden_states[1:]
            total = total + weight * alp_loss(*states, inputs["attention_mask"], **options)
        return total

    return loss


def label_loss(model, inputs, labels):
    return cross_entropy(model(**inputs).logits, labels)


def train(model, examples, loss, epochs, lr, seed, title):
    """Minimise ``loss(model, inputs, labels)``; return the seconds it took."""
    torch.manual_seed(seed)
    shuffle = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    total = epochs * len(examples)
    warmup = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / (total - warmup + 1))
    )
    start = time.perf_counter()
    model.train()
    with tqdm(total=total, desc=title, unit="step", dynamic_ncols=True) as bar:
        for _ in range(epochs):
            for inputs, labels in examples.batches(shuffle):
                value = loss(model, inputs, labels)
                value.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.set_postfix(loss=f"{value.item():.3f}")
                bar.update()
    return time.perf_counter() - start


def scores_of(accuracy, rows):
    return {"accuracy": accuracy, "standard_error": (accuracy * (1 - accuracy) / rows) ** 0.5}


@torch.no_grad()
def evaluate(model, examples, metric=None):
    """Accuracy, its standard error, and the task's own metric where it has one."""
    model.eval()
    predicted, expected = [], []
    for inputs, labels in examples.batches():
        predicted += model(**inputs).logits.argmax(-1).tolist()
        expected += labels.tolist()
    accuracy = sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)
    scores = scores_of(accuracy, len(expected))
    if metric:
        name, function = metric
        scores[name] = float(function(expected, predicted))
    return scores


@torch.no_grad()
def mean_attention(method, teacher, student, examples, args):
    """Mean over the rows that count of the attention (m, n), and its mean entropy (m,)."""
    student.eval()
    options, compared = alp_options(method, teacher, student, args)
    attention, entropy, rows = 0.0, 0.0, 0.0
    for inputs, _ in examples.batches():
        t = teacher(**inputs, output_hidden_states=True).hidden_states[1:]
        s = student(**inputs, output_hidden_states=True).hidden_states[1 : 1 + compared]
        details = alp_loss(s, t, inputs["attention_mask"], **options, return_details=True)
        weights = details.attention.flatten(1, -2)  # (m, rows, n): zeros on rows that do not count
        counted = weights[0].sum()
        attention, rows = attention + weights.sum(1), rows + counted
        entropy = entropy + details.entropy * counted
    return attention / rows, entropy / rows


def distil(teacher, training, validation, metric, args):
    """Train one student per method; save each with its attention, and return the scores of all."""
    teacher.eval()
    # Embeddings, head and every k-th layer of the teacher; 12 -> 4: layers 3, 6, 9 and 12, counted from 1.
    student = student_from_teacher(teacher, args.student_layers, "skip")
    results = {"student before": evaluate(student, validation, metric) | {"seconds": 0.0}}
    for method in args.method:
        student = student_from_teacher(teacher, args.student_layers, "skip")
        loss = distillation_loss(method, teacher, student, args)
        seconds = train(student, training, loss, args.epochs, args.lr, args.seed, method)
        results[method] = evaluate(student, validation, metric) | {"seconds": seconds}
        student.save_pretrained(args.output / method)
        if METHODS[method]:
            attention, entropy = mean_attention(method, teacher, student, validation, args)
            results[method]["entropy"] = entropy.tolist()
            plot_attention(attention, entropy, method, args.output / f"attention_{method}.png")
    return results


def plot_attention(attention, entropy, title, path):
    m, n = attention.shape
    figure = Figure(figsize=(3.5 + 0.5 * n, 1.5 + 0.5 * m), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(attention.numpy(), cmap="viridis", vmin=0, vmax=float(attention.max()))
    axes.set_xticks(range(n), [str(j + 1) for j in range(n)])
    axes.set_yticks(range(m), [f"{i + 1}  ({entropy[i]:.2f} nats)" for i in range(m)])
    axes.set_xlabel("teacher layer")
    axes.set_ylabel("student layer (entropy)")
    axes.set_title(title)
    figure.colorbar(image, label="mean attention")
    figure.savefig(path, dpi=150)


def print_table(results):
    columns = [key for key in results["teacher"] if key not in ("standard_error", "seconds", "entropy")]
    print(f"\n{'':24}" + "".join(f"{name:>18}" for name in columns) + f"{'seconds':>10}")
    for name, row in results.items():
        cells = [
            f"{row[key]:.4f} ± {row['standard_error']:.4f}" if key == "accuracy" else f"{row[key]:.4f}"
            for key in columns
        ]
        print(f"{name:24}" + "".join(f"{cell:>18}" for cell in cells) + f"{row['seconds']:>10.1f}")
    print("± is the standard error of the accuracy on the validation rows.")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="folder of a transformers encoder; none: the generated task")
    parser.add_argument("--data", type=Path, help="folder that holds TASK/train.jsonl and TASK/validation.jsonl")
    parser.add_argument("--task", choices=TASKS, default="sst2")
    parser.add_argument("--fine-tune", action="store_true", help="train the teacher on the labels and save it")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=["kd", "alp"])
    parser.add_argument("--student-layers", type=int)
    parser.add_argument("--pooling", choices=["token", "cls", "mean"], help="rows to compare; default: the method's")
    parser.add_argument("--scale", type=float, help="factor of the attention's dot products; default 1/sqrt(D)")
    parser.add_argument("--keep-last-layer", action="store_true", help="pkd-skip: compare the last layer too")
    parser.add_argument("--alp-weight", type=float, help="weight of the layer loss; default: the method's")
    parser.add_argument("--kd-weight", type=float, default=0.5, help="weight of the KD term; CE has the rest")
    parser.add_argument("--temperature", type=float, default=5.0)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--train-rows", type=int, help="train on this many rows, the same for every --seed")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the data order and the dropout")
    parser.add_argument("--output", type=Path, default=Path("out/distill_glue"))
    args = parser.parse_args(argv)
    if (args.teacher is None) != (args.data is None):
        parser.error("--teacher and --data go together; leave both out for the generated task")
    if args.fine_tune and args.teacher is None:
        parser.error("--fine-tune needs --teacher and --data")
    for name, value in (PRETRAINED if args.teacher else GENERATED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def generated(args):
    """The generated task and a small BERT trained on it, also as folders of weights and data."""
    print("A small BERT, trained here on generated reviews: this shows the loop at work, not what real text gives.")
    tokenizer, splits = make_tokenizer(), []
    for split, count, seed in (("train", args.train_rows, 1), ("validation", 1000, 2)):
        texts, labels = make_rows(count, seed)
        splits.append(Examples(tokenizer, texts, labels, args.batch_size))
        rows = [{"sentence": text, "label": label} for text, label in zip(*texts, labels, strict=True)]
        write_jsonl(args.output / "data" / f"{split}.jsonl", rows)
    teacher = make_bert(len(tokenizer))
    seconds = train(teacher, splits[0], label_loss, 4, args.lr, args.seed, "teacher")
    teacher.save_pretrained(args.output / "teacher")
    tokenizer.save_pretrained(args.output / "teacher")
    return teacher, *splits, seconds


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


def by_command(args):
    """Distil the generated task's teacher with attention once more, by ``alpkd distill``; return the scores."""
    output = args.output / "alpkd_distill"
    shutil.rmtree(output, ignore_errors=True)  # the command does not write over a finished run
    options, weight = METHODS["alp"]
    given = {
        "teacher": args.output / "teacher", "data": args.output / "data", "task": "classification",
        "text-columns": "sentence", "output": output, "method": "alp", "depth": args.student_layers,
        "pooling": args.pooling or options.get("pooling", "token"), "scale": args.scale,
        "ce-weight": 1 - args.kd_weight, "kd-weight": args.kd_weight, "temperature": args.temperature,
        "alp-weight": weight if args.alp_weight is None else args.alp_weight, "epochs": args.epochs,
        "batch-size": args.batch_size, "learning-rate": args.lr, "seed": args.seed,
    }  # fmt: skip
    command = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    command = ["distill", *command, "--cpu"]
    print(f"\nThe same by the command:\nalpkd {shlex.join(command)}")
    status = alpkd(command)
    if status != 0:
        raise SystemExit(status)
    run = json.loads((output / "metrics.json").read_text(encoding="utf8"))
    rows = len((args.output / "data" / "validation.jsonl").read_text(encoding="utf8").splitlines())
    return scores_of(run["metrics"]["accuracy"], rows) | {"seconds": run["train_seconds"]}


def main(argv=None):
    args = parse_arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)  # of the weights that no folder holds: the head, or the generated task's teacher
    seconds, metric = 0.0, None
    if args.teacher:
        metric = TASKS[args.task][1]
        tokenizer = AutoTokenizer.from_pretrained(args.teacher)
        # float32 whatever the file holds: AdamW on bfloat16 weights loses small steps.
        teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher, num_labels=2, dtype=torch.float32)
        training = read_glue(tokenizer, args.data, args.task, "train", args.batch_size, args.train_rows)
        validation = read_glue(tokenizer, args.data, args.task, "validation", args.batch_size)
        if args.fine_tune:
            seconds = train(teacher, training, label_loss, args.epochs, args.lr, args.seed, "teacher")
            teacher.save_pretrained(args.output)
            tokenizer.save_pretrained(args.output)
    else:
        teacher, training, validation, seconds = generated(args)
    results = {"teacher": evaluate(teacher, validation, metric) | {"seconds": seconds}}
    if not args.fine_tune:
        results |= distil(teacher, training, validation, metric, args)
    if not args.teacher:
        results[BY_COMMAND] = by_command(args)
    print_table(results)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")
    print(f"Students, results.json and the pictures of the attention are in {args.output}.")
    return results


if __name__ == "__main__":
    main()
