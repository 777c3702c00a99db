#!/usr/bin/env bash
# Everything that is worth measuring on a GPU, in one command, to be given again until nothing is left to do.
#
#   benchmarks/gpu.sh RESULTS [WHEELS]     RESULTS: folder for all results, kept and continued if it is there
#                                          WHEELS: folder with wheels of what is missing, for machines without network
#   TINY=1 benchmarks/gpu.sh RESULTS       rehearsal: tiny sizes, built-in digits, 15 minutes on two CPU cores
#
# Python, JAX for the GPU, Flax, optax, Orbax and (for the comparison) torch and torchvision should be there;
# $PYTHON names the interpreter, $TFDS_DATA_DIR the folder that has CIFAR-10. Stages run in order, each in a time limit
# of its own and in 8 minutes ($DEADLINE seconds) together, and each leaves RESULTS/STAGE.log and RESULTS/STAGE.done
# before the next starts; a stage that fails or runs out of time does not stop the others, and the same command again
# runs only what is not done.
set -uo pipefail

results=$(mkdir -p "${1:?give a folder for the results}" && cd "$1" && pwd)
wheels=${2:-}
python=${PYTHON:-python3}
tiny=${TINY:-}
deadline=${DEADLINE:-480} # seconds for all stages
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=$results/compilation_cache
# Both frameworks measure in one process: neither may take all of the memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=false

stage() { # stage NAME SECONDS COMMAND...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  [ -e "$results/$name.done" ] && return
  [ -n "$tiny" ] && seconds=$((5 * seconds)) # a CPU compiles for longer
  seconds=$((seconds < deadline - start ? seconds : deadline - start))
  if [ "$seconds" -lt 10 ]; then
    echo "no time was left" | tee "$results/$name.log"
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
# Golden numbers on one device of the default kind, in float32; XLA and cuDNN would use TF32 otherwise.
stage golden 120 env JAX_DEFAULT_MATMUL_PRECISION=highest "$python" -m pytest -n 0 -q -p no:cacheprovider -k golden \
  tests/test_losses.py tests/test_lars.py tests/test_models.py tests/test_knn.py tests/test_augmentations.py tests/test_crops.py
if [ -n "$tiny" ]; then
  options=(--config configs/digits.py --images-per-class 10 --test-images-per-class 5 --batch-size 20 --train-patches 4
    --num-neighbours 5 --valid-patches 2 --linear-epochs 2 --no-untrained)
  best=("${options[@]}" --valid-crops grid --valid-patches 4 --embedded-layer stages --cells 2 --whiten)
  size=(--size TINY)
  theirs=(--width 64) # torchvision's ResNet-18 has no other
else
  options=() best=(--config configs/cifar10_best.py) size=() theirs=()
fi
# Twice: the first fills the compilation cache, the second is what a user waits for from then on.
stage ours_first 180 "$python" -m benchmarks.end_to_end ours "${options[@]}" --workdir "$results/ours_first"
stage ours 120 "$python" -m benchmarks.end_to_end ours "${options[@]}" --workdir "$results/ours"
stage compare 240 "$python" -m benchmarks.compare "${size[@]}" --output "$results/compare.json"
if "$python" -c "import torch, torchvision" 2>/dev/null; then
  stage theirs 400 "$python" -m benchmarks.end_to_end theirs "${options[@]}" "${theirs[@]}" --workdir "$results/theirs"
fi
stage scaling 120 "$python" -m benchmarks.scaling "${size[@]}" --output "$results/scaling.json"
# What the recipes reach; training that is stopped goes on in the next call.
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
