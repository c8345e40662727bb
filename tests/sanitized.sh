#!/usr/bin/env bash
# The tests of the native library against a build with AddressSanitizer and UndefinedBehaviorSanitizer.
# Usage: tests/sanitized.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
build=build/sanitized

"$python" -m pip install --quiet --constraint constraints.txt cmake ninja nanobind
PATH="$(realpath -s "$(dirname "$python")"):$PATH"
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(realpath -s "$python")" -DCHATGLM_OV_SANITIZE=ON >/dev/null
cmake --build "$build"
library=$(ls "$build"/_native*.so)

# The runtimes of the sanitizers come first in the process. TBB must not load its helpers apart from them. Python
# frees little at its end, so leaks are not looked for. Reports go to a file: pytest holds the error stream.
reports=$PWD/$build/report
rm -f "$reports".*
status=0
env LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)" \
    ASAN_OPTIONS="detect_leaks=0:log_path=$reports" \
    UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1:log_path=$reports" \
    TBB_ENABLE_SANITIZERS=1 CHATGLM_OV_NATIVE="$PWD/$library" \
    "$python" -m pytest -q tests/test_native_*.py tests/test_op_*.py \
    >"$build/tests.log" 2>&1 || status=$?
tail -n 15 "$build/tests.log"
cat "$reports".* 2>/dev/null || true
exit "$status"
