# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer, which builds the PEFT model itself. Needs `pip install trl`."""

from common import model_and_tokenizer, parse, texts
from datasets import Dataset
from peft import GraloraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

import gralora_ext

options = parse(__doc__)
set_seed(0)
model, tokenizer = model_and_tokenizer(options.tiny)

gralora_ext.enable()
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_length=192,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
    ),
    train_dataset=Dataset.from_dict({"text": texts(options.tiny)}),
    processing_class=tokenizer,
    peft_config=GraloraConfig(r=16, alpha=32, gralora_k=2, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(f"{options.output}/adapter")
