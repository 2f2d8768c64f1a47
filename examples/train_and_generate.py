"""Describe a hybrid model in Python, train it on the default corpus, load the checkpoint and write some text.

    python examples/train_and_generate.py [STEPS] [RUN_FOLDER]

The same run from the command line is `hybridlm train model=hybrid_tiny model.schedule.ratio=3 ...`.
"""

import sys

import hybridlm
from hybridlm.model import generate


def main(steps: int = 100, run_dir: str = "runs/example") -> str:
    """Train for `steps` steps in `run_dir`; return what the model wrote."""
    config = hybridlm.load_config("train", [
        "model=hybrid_tiny", "model.schedule.linear=gdn", "model.schedule.full=full", "model.schedule.ratio=3",
        f"training.steps={steps}", "training.sequence_length=128", "training.batch_size=4",
        f"training.eval_every={steps}", f"training.checkpoint_every={steps}", "optimizer.lr=3e-3",
        f"run_dir={run_dir}"])
    result = hybridlm.train(config)
    print(f"validation loss {result.validation['validation_loss']:.3f} nats per token, in {result.checkpoint}")

    model = hybridlm.load_checkpoint(result.checkpoint)
    tokenizer = model.tokenizer
    prompt = tokenizer.encode(b"def read(self, ")
    sampled = generate(model, prompt, 60, temperature=0.7, seed=0, eos=tokenizer.eos_id,
                       vocab_size=tokenizer.vocab_size)  # the model has room for more ids than the tokenizer has
    text = tokenizer.decode([int(token[0]) for token in sampled])
    print(f"def read(self, {text}")
    return text


if __name__ == "__main__":
    main(*(int(word) if word.isdigit() else word for word in sys.argv[1:]))
