"""Train a BERT to 90 % zeros with the Trainer of transformers: `python examples/hf_text_classification.py [--resume]`.

The texts are scikit-learn's digits: each of the 64 pixels is a word, namely its brightness from 0 to 16.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, Trainer, TrainingArguments

import feather_param
from feather_param.integrations.transformers import FeatherCallback


def build() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=17, max_position_embeddings=64, num_hidden_layers=2, num_attention_heads=4)
    config.hidden_size, config.intermediate_size, config.num_labels = 64, 128, 10
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.initializer_range = 0.1  # the default, 0.02, is for larger networks
    return BertForSequenceClassification(config)


def accuracy(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(found.predictions, axis=-1) == found.label_ids).mean())}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the whole training (8)")
    parser.add_argument("--folder", type=Path, default=Path("runs/hf"), help="folder of the checkpoints (runs/hf)")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error(f"expected --epochs to be at least 1, got {options.epochs}")
    if options.resume and not any(options.folder.glob("checkpoint-*")):
        parser.error(f"expected a checkpoint in {options.folder} to resume, found none; leave out --resume")
    transformers.logging.disable_progress_bar()
    model = build()

    pixels, digits = map(torch.as_tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).tolist()
    rows: list[dict[str, Tensor]] = [{"input_ids": pixels[i].long(), "labels": digits[i]} for i in order]
    train, test = rows[360:], rows[:360]

    args = TrainingArguments(
        str(options.folder),
        max_steps=options.epochs * math.ceil(len(train) / 32),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=360,
        learning_rate=3e-3,
        warmup_steps=40,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=args.max_steps)  # added
    feather = FeatherCallback(controller)  # added
    data = {"train_dataset": train, "eval_dataset": test}
    trainer = Trainer(model, args, **data, compute_metrics=accuracy, callbacks=[feather])  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(str(options.folder / "sparse"))  # the model is plain now

    loaded = BertForSequenceClassification.from_pretrained(options.folder / "sparse")
    texts, labels = (torch.stack([row[key] for row in test]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        outputs = loaded.eval()(input_ids=texts).logits
        torch.testing.assert_close(model.eval()(input_ids=texts).logits, outputs)
    weights = [layer.weight for layer in loaded.modules() if isinstance(layer, nn.Linear)]
    zeros, total = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
    right = accuracy(EvalPrediction(outputs.numpy(), labels.numpy()))["accuracy"]
    print(f"test accuracy {right:.1%}, {zeros:,} of {total:,} weights are zero ({zeros / total:.2%})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
