#!/usr/bin/env bash
# The tests of everything that builds on transformers, with older releases than the newest one, which is in .venv:
#   tests/matrix.sh              every release below, the oldest supported one first
#   tests/matrix.sh 4.57.6       this one
#   tests/matrix.sh --install    no tests yet, only the releases
# Each release gets a folder in .matrix that goes before .venv, with which it shares torch and OpenVINO.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python

# transformers release -> what it needs in other versions than .venv has
declare -A needs=(
  [4.48.3]="tokenizers==0.21.4 huggingface-hub==0.36.0"
  [4.57.6]="tokenizers==0.22.2 huggingface-hub==0.36.0"
  [5.5.0]="tokenizers==0.22.2 huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9"
)
install_only=false
if [[ "${1:-}" == --install ]]; then
  install_only=true
  shift
fi
versions=("$@")
if [[ $# -eq 0 ]]; then
  mapfile -t versions < <(printf '%s\n' "${!needs[@]}" | sort -V)
fi

# Collecting the other files takes as long as a tenth of the tests.
mapfile -t files < <(grep -l "mark.transformers_matrix" tests/test_*.py)

for version in "${versions[@]}"; do
  if [[ -z "${needs[$version]:-}" ]]; then
    echo "transformers $version is not in the table of $0" >&2
    exit 2
  fi
  folder=".matrix/$version" requirements="transformers==$version ${needs[$version]}"
  # What was installed is the mark of a whole folder, and of one of this table.
  if [[ "$(cat "$folder/.installed" 2>/dev/null)" != "$requirements" ]]; then
    rm -rf "$folder"
    # shellcheck disable=SC2086 (a list of requirements)
    "$python" -m pip install --quiet --no-deps --target "$folder" $requirements
    echo "$requirements" >"$folder/.installed"
  fi
  if $install_only; then continue; fi
  PYTHONPATH="$folder" "$python" -c "import transformers as t; assert t.__version__ == '$version', t.__file__"
  echo "== transformers $version"
  # What a release changes shows in shallow models and short texts.
  PYTHONPATH="$folder" "$python" -m pytest -q -m transformers_matrix -k "not v1_28l and not test_work_grows" "${files[@]}"
done
