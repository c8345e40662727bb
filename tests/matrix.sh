#!/usr/bin/env bash
# The tests of everything that builds on transformers, with releases between the oldest supported one and the newest,
# which `make test` runs:
#   tests/matrix.sh              every release below
#   tests/matrix.sh 4.57.6       this one
# Each release gets a folder in .matrix that goes before .venv, with which it shares torch and OpenVINO.
set -euo pipefail
cd "$(dirname "$0")/.."

# transformers release -> what it needs in other versions than .venv has
declare -A needs=(
  [4.57.6]="tokenizers==0.22.2 huggingface-hub==0.36.0"
  [5.5.0]="tokenizers==0.22.2 huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9"
)
versions=("$@")
if [[ $# -eq 0 ]]; then
  mapfile -t versions < <(printf '%s\n' "${!needs[@]}" | sort -V)
fi

for version in "${versions[@]}"; do
  if [[ -z "${needs[$version]:-}" ]]; then
    echo "transformers $version is not in the table of $0" >&2
    exit 2
  fi
  folder=".matrix/$version"
  if [[ ! -e "$folder/.complete" ]]; then
    rm -rf "$folder"
    # shellcheck disable=SC2086 (a list of requirements)
    .venv/bin/python -m pip install --quiet --no-deps --target "$folder" "transformers==$version" ${needs[$version]}
    touch "$folder/.complete"
  fi
  PYTHONPATH="$folder" .venv/bin/python -c "import transformers as t; assert t.__version__ == '$version', t.__file__"
  echo "== transformers $version"
  PYTHONPATH="$folder" .venv/bin/python -m pytest -q -m transformers_matrix
done
