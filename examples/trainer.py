# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer on a GraLoRA model with fused layers."""

from common import model_and_tokenizer, parse, texts
from peft import GraloraConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed

import gralora_ext

options = parse(__doc__)
set_seed(0)
base, tokenizer = model_and_tokenizer(options.tiny)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

gralora_ext.enable()
model = get_peft_model(base, GraloraConfig(r=16, alpha=32, gralora_k=2, target_modules="all-linear"))

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=[tokenizer(text, truncation=True, max_length=192) for text in texts(options.tiny)],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
trainer.save_model(f"{options.output}/adapter")
