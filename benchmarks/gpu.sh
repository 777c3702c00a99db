#!/usr/bin/env bash
# Runs every GPU measurement with one command. Repeat the command until it reports that nothing is left to do.
#
#   benchmarks/gpu.sh RESULTS [WHEELS]     RESULTS: folder for all results; an existing one is continued
#                                          WHEELS: folder of wheels of missing packages, for machines without network
#   TINY=1 benchmarks/gpu.sh RESULTS       rehearsal: tiny sizes, built-in digits, 15 minutes on two CPU cores
#
# Needs Python, JAX for the GPU, Flax, optax, Orbax and (for the comparison) torch and torchvision. $PYTHON names the
# interpreter, $TFDS_DATA_DIR the folder that has CIFAR-10. Stages run in order. Each has its own time limit, and all
# together have 8 minutes ($DEADLINE seconds). Each stage writes RESULTS/STAGE.log and, on success, RESULTS/STAGE.done.
# A stage that fails or runs out of time does not stop the others. The same command again runs the stages without .done.
set -uo pipefail

results=$(mkdir -p "${1:?give a folder for the results}" && cd "$1" && pwd)
wheels=${2:-}
python=${PYTHON:-python3}
tiny=${TINY:-}
deadline=${DEADLINE:-480} # seconds for all stages
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=$results/compilation_cache
# One process measures both frameworks, and neither may reserve all of the memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=false

stage() { # stage NAME SECONDS COMMAND...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  [ -e "$results/$name.done" ] && return
  [ -n "$tiny" ] && seconds=$((5 * seconds)) # compilation takes longer on a CPU
  seconds=$((seconds < deadline - start ? seconds : deadline - start))
  if [ "$seconds" -lt 10 ]; then
    echo "no time left" | tee "$results/$name.log"
    return
  fi
  echo "== $name"
  if timeout "$seconds" "$@" >"$results/$name.log" 2>&1; then
    echo "$((SECONDS - start)) s" >"$results/$name.done"
  else
    echo "stopped after $((SECONDS - start)) s with exit code $?" | tee -a "$results/$name.log"
  fi
  tail -n 12 "$results/$name.log"
}

install_missing() {
  "$python" -m pip install --quiet --no-deps --no-index --find-links "$wheels" "$wheels"/*.whl
}

machine() {
  nvidia-smi || true
  git log -1 --format='commit %h of %cs' || true
  "$python" -c 'import json; from benchmarks.measure import environment; print(json.dumps(environment(), indent=2))'
}

export -f install_missing machine
export python wheels
[ -n "$wheels" ] && stage install 60 bash -c install_missing
stage machine 60 bash -c machine
# Golden tests on the default device, in full float32 precision. Without the variable, XLA and cuDNN use TF32.
stage golden 120 env JAX_DEFAULT_MATMUL_PRECISION=highest "$python" -m pytest -n 0 -q -p no:cacheprovider -k golden \
  tests/test_losses.py tests/test_lars.py tests/test_encoder.py tests/test_knn.py tests/test_augmentations.py tests/test_crops.py
if [ -n "$tiny" ]; then
  options=(--config configs/digits.py --images-per-class 10 --test-images-per-class 5 --batch-size 20 --train-patches 4
    --num-neighbours 5 --valid-patches 2 --linear-epochs 2 --no-untrained)
  best=("${options[@]}" --valid-crops grid --valid-patches 4 --embedded-layer stages --cells 2 --whiten)
  size=(--size TINY)
  theirs=(--width 64) # the only width of torchvision's ResNet-18
else
  options=() best=(--config configs/cifar10_best.py) size=() theirs=()
fi
# Twice: the first run fills the compilation cache; the second is the time that a user sees from then on.
stage ours_first 180 "$python" -m benchmarks.end_to_end ours "${options[@]}" --workdir "$results/ours_first"
stage ours 120 "$python" -m benchmarks.end_to_end ours "${options[@]}" --workdir "$results/ours"
stage compare 240 "$python" -m benchmarks.compare "${size[@]}" --output "$results/compare.json"
if "$python" -c "import torch, torchvision" 2>/dev/null; then
  stage theirs 400 "$python" -m benchmarks.end_to_end theirs "${options[@]}" "${theirs[@]}" --workdir "$results/theirs"
fi
stage scaling 120 "$python" -m benchmarks.scaling "${size[@]}" --output "$results/scaling.json"
# Accuracies of the recipes. Interrupted training resumes in the next call.
recipe() { # recipe NAME [options of train.py]
  stage "$1" 480 "$python" -m benchmarks.end_to_end ours --workdir "$results/$1" "${@:2}"
}
recipe default_seed1 "${options[@]}" --seed 1
recipe default_seed2 "${options[@]}" --seed 2
recipe best_1_epoch "${best[@]}"
recipe best_2_epochs "${best[@]}" --max-epochs 2
recipe best_10_epochs "${best[@]}" --max-epochs 10 --max-to-keep 10
stage race 240 "$python" -m experiments.race --workdir "$results/best_10_epochs"

failed=()
for log in "$results"/*.log; do
  [ -e "${log%.log}.done" ] || failed+=("$(basename "${log%.log}")")
done
echo "results in $results; not done: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
