#!/usr/bin/env bash
# From nothing to a trained hybrid model in a few minutes on a CPU, with no download but the packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
run=${1:-runs/quickstart}
.venv/bin/hybridlm train experiment=quickstart run_dir="$run"
echo
echo "A sample from the trained model:"
.venv/bin/hybridlm generate "$run" --prompt 'def read(self, ' --max-new-tokens 200 --temperature 0.7 --seed 0
cat <<EOF

What to try next (source .venv/bin/activate first):

  hybridlm generate $run --prompt 'class '
      more of what it writes
  hybridlm inspect model=kimi_linear_48b
      what a full-size system costs, from its config alone
  hybridlm train experiment=qwen3_next_tiny
      another of the four systems
  hybridlm train experiment=quickstart model.schedule.ratio=1 run_dir=runs/ratio1
      another hybrid ratio
  hybridlm train data.path=/your/texts run_dir=runs/mine
      your own text, JSONL or parquet

README.md and docs/ have the rest.
EOF
