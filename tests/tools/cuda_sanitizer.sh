#!/usr/bin/env bash
# Runs sanitizer_cases.py under compute-sanitizer's tools, on a machine with a card and the package installed:
#   tests/tools/cuda_sanitizer.sh [memcheck racecheck initcheck synccheck]
# Fails on any finding. PYTHON and COMPUTE_SANITIZER name the programs where they are not on PATH.
set -uo pipefail
cd "$(dirname "$0")"
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD/..
python=${PYTHON:-python3} sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}
command -v "$sanitizer" >/dev/null || { echo "no $sanitizer: it comes with the CUDA toolkit" >&2; exit 2; }
[ $# -gt 0 ] || set -- memcheck racecheck initcheck synccheck

# Every tensor has memory of its own, so that what lies past its end is nobody's.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
log=$(mktemp) status=0 summary=
trap 'rm -f "$log"' EXIT
for tool; do
  echo "== $tool"
  options=(--tool "$tool" --error-exitcode 1)
  # Errors that calls of the driver return are left to the program: torch asks for symbols that a driver may lack.
  [ "$tool" = memcheck ] && options+=(--padding 512 --report-api-errors no)
  SECONDS=0
  "$sanitizer" "${options[@]}" "$python" sanitizer_cases.py 2>&1 | tee "$log"
  code=$?
  # Racecheck counts its warnings in the summary alone.
  if [ $code = 0 ] && grep -qE 'cases ran' "$log" &&
    grep -qE 'ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)' "$log"; then
    verdict=clean
  else
    verdict="FOUND SOMETHING (exit status $code)" status=1
  fi
  summary+="$tool: $verdict, $SECONDS s"$'\n'
done
printf '%s' "$summary"
exit $status
