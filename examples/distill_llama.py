"""Distil a Llama-style decoder in a plain loop, with activation checkpointing. Random weights and random tokens.

Run: python examples/distill_llama.py --pooling last
"""

import argparse

import torch
from torch.nn.functional import kl_div
from transformers import LlamaConfig, LlamaForCausalLM

from alpkd_fast import ALPLoss
from alpkd_fast.capture import HiddenStates


def make_model(layers, width):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pooling", choices=["token", "last"], default="token")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)

    teacher, student = make_model(8, 128).eval().requires_grad_(False), make_model(3, 64).train()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    criterion = ALPLoss(student_dim=64, teacher_dim=128)
    optimizer = torch.optim.AdamW([*student.parameters(), *criterion.parameters()], lr=1e-3)

    ids = torch.randint(1000, (8, 32))
    mask = (torch.arange(32) < torch.randint(8, 33, (8, 1))).long()
    labels = ids.masked_fill(mask == 0, -100)
    with HiddenStates(teacher, pooling=options.pooling) as t, HiddenStates(student, pooling=options.pooling) as s:
        for step in range(options.steps):
            with torch.no_grad():
                teacher_logits = teacher(input_ids=ids, attention_mask=mask).logits
            out = student(input_ids=ids, attention_mask=mask, labels=labels)
            alp = criterion(s.take(), t.take(), s.row_weights)
            counted = mask.bool()
            kd = kl_div(
                out.logits[counted].log_softmax(-1),
                teacher_logits[counted].log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
            loss = out.loss + kd + alp
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in (0, options.steps - 1):
                print(f"step {step + 1}: ce {out.loss:.4f}, kd {kd:.4f}, alp {alp:.4f}")


if __name__ == "__main__":
    main()
