"""Compare mixers by what they can remember: train each on recall of key-value pairs, at equal size and budget.

    python examples/compare_mixers.py [STEPS] [MIXER ...]

`hybridlm sweep ... sweep.probes=[...]` is the full-sized version: it also matches parameters, and draws a report.
"""

import sys

import hybridlm
from hybridlm.evaluation.probe_training import train_on_probe
from hybridlm.evaluation.probes import make_probe


def main(steps: int = 300, *mixers: str) -> dict[str, float]:
    """Print one row per mixer and return its accuracy on the recalled tokens, at the length of training."""
    probe = make_probe("mqar", {"num_pairs": 4})
    found = {}
    print(f"{'mixer':<12}{'parameters':>12}{'loss':>8}{'accuracy':>10}    chance {probe.chance:.3f}")
    for name in mixers or ("lightning", "gdn", "kda", "full"):
        config = hybridlm.load_config("hybrid_tiny", [
            "model.num_layers=2", f"model.schedule.pattern=[{name}]",
            "model.feed_forward={kind: dense, intermediate_size: 128}"])
        result = train_on_probe(config.model, probe, steps, lr=3e-3, length=32, eval_lengths=(32,), examples=128)
        found[name] = result.accuracy[32].token
        print(f"{name:<12}{result.num_params:>12,}{result.loss:>8.3f}{found[name]:>10.3f}")
    return found


if __name__ == "__main__":
    main(*(int(word) if word.isdigit() else word for word in sys.argv[1:]))
