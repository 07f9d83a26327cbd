import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a tiny model and sentences; what a test adds stays for the others."""
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    from tiny import bert, make_tokenizer, masked_lm, sentences, write_jsonl

    folder = tmp_path_factory.mktemp("cli")
    for name, model in (("model", bert()), ("masked", masked_lm())):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for split, count in (("train", 192), ("validation", 40)):
        rows = sentences(count, seed=count)
        write_jsonl(folder / "data" / "sst2" / f"{split}.jsonl", rows)
        scores = [{"sentence1": r["sentence"], "sentence2": "film", "label": 5.0 * r["label"]} for r in rows]
        write_jsonl(folder / "data" / "stsb" / f"{split}.jsonl", scores)
        write_jsonl(folder / "data" / "mlm" / f"{split}.jsonl", [{"text": r["sentence"]} for r in rows])
    return folder


@pytest.fixture(scope="session")
def teacher(folder):
    """The tiny model, fine-tuned by the command itself."""
    from alpkd_fast.cli.main import main

    options = ["--epochs", "5", "--learning-rate", "3e-3", "--batch-size", "16", "--cpu"]
    data = ["--task", "sst2", "--data", str(folder / "data")]
    output = folder / "teacher"
    assert main(["finetune", "--model", str(folder / "model"), *data, "--output", str(output), *options]) == 0
    return output
