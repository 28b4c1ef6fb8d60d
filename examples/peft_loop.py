# SPDX-License-Identifier: Apache-2.0
"""PEFT with a training loop of your own: one line makes the layers fast."""

import torch
from common import model_and_tokenizer, parse, texts
from peft import GraloraConfig, get_peft_model

import gralora_ext

options = parse(__doc__)
torch.manual_seed(0)
base, tokenizer = model_and_tokenizer(options.tiny)

gralora_ext.enable()  # the one line
model = get_peft_model(base, GraloraConfig(r=16, alpha=32, gralora_k=2, target_modules="all-linear"))
model.print_trainable_parameters()

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
rows, size = texts(options.tiny), 4
model.train()
for step in range(options.steps):
    chosen = [rows[(step * size + i) % len(rows)] for i in range(size)]
    batch = tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=192)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}")

model.save_pretrained(f"{options.output}/adapter")  # loads in stock PEFT
model.merge_and_unload().save_pretrained(f"{options.output}/merged")  # loads in stock transformers
