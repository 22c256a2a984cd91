#!/usr/bin/env bash
# Build, test, sanitize and benchmark on a machine with a GPU and without a package index.
#
#   tools/gpu_session.sh            # all stages that are not done yet
#   tools/gpu_session.sh tests      # one stage, again
#   tools/gpu_session.sh --list
#   tools/gpu_session.sh --fresh    # all stages, again
#
# A call ends within CALL_SECONDS (570 by default); the next one goes on where it stopped: stages that are done are
# passed over, and so are tests that passed and benchmarks that were measured. Three calls should do. The marks lie in
# $WORK, ./build/gpu-session by default, and the results in $OUT, ./gpu-results by default. PYTHON names the
# interpreter. What is not installed is skipped, and named.
# Stages are called by their names.
# shellcheck disable=SC2329
set -u
cd "$(dirname "$0")/.." || exit
readonly ROOT=$PWD
readonly RESULTS=${OUT:-$ROOT/gpu-results}
readonly WORK=${WORK:-$ROOT/build/gpu-session}  # survives between calls, as results may not
readonly CALL_SECONDS=${CALL_SECONDS:-570}
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "gpu_session: there is no ${PYTHON:-python3}"; exit 2; }
readonly PYTHON
# The published figures before the rest of the benchmarks, and both after what says that they are of right results.
readonly STAGES=(machine build probe commands streams processes battery sanitize published tests benchmarks)
mkdir -p "$RESULTS" "$WORK/marks"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false

say() { printf '== %s\n' "$*" | tee -a "$RESULTS/session.log"; }
has_module() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)" 2>/dev/null; }
skip_without() {  # names what is missing; fails if anything is
  local missing=()
  for module in "$@"; do has_module "$module" || missing+=("$module"); done
  [[ ${#missing[@]} -eq 0 ]] && return 0
  say "skipped: not installed: ${missing[*]}"
  return 1
}
target_of_card() { nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. '; }

stage_machine() {
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem --format=csv || return 1
  nvcc --version | tail -2
  "$PYTHON" -c 'import jax, jaxlib; print("jax", jax.__version__, "jaxlib", jaxlib.__version__, jax.devices())' || return 1
  local module
  for module in nanobind nanobind_backend cmake ninja pytest xdist hypothesis fedjax haiku optax sklearn torch byzfl \
    flwr flatbuffers matplotlib; do
    has_module "$module" && echo "has $module" || echo "lacks $module"
  done
}

# Both modules for this machine's Python and card alone, put beside the package's sources.
stage_build() {
  local backend=ON generator=()
  has_module nanobind_backend || backend=OFF
  command -v ninja > /dev/null && generator=(-G Ninja)
  cmake -S . -B "$WORK/cmake" "${generator[@]}" -DFEDFUSE_CUDA=ON -DFEDFUSE_CUDA_STATISTICS=ON \
    -DFEDFUSE_CUDA_TARGETS="$(target_of_card)" -DFEDFUSE_NANOBIND_BACKEND="$backend" -DPython_EXECUTABLE="$PYTHON" \
    -DSKBUILD_SABI_COMPONENT=Development.SABIModule || return 1
  # Appended to, since a build that goes on compiles only the rest.
  cmake --build "$WORK/cmake" -j "$(nproc)" >> "$WORK/build.log" 2>&1 || { tail -40 "$WORK/build.log"; return 1; }
  cp "$WORK"/cmake/_cpu*.so "$WORK"/cmake/_cuda*.so fedfuse_jax/
  "$PYTHON" tools/check_cuda_build.py "$WORK/build.log" --targets "$(target_of_card)" > "$RESULTS/registers.txt"
  local status=$?
  tail -5 "$RESULTS/registers.txt"
  return "$status"
}

stage_probe() {
  "$PYTHON" - << 'PYTHON' 
import jax, jax.numpy as jnp, numpy as np
import fedfuse_jax as ff

ff.show_versions()
assert jax.default_backend() == "gpu", jax.default_backend()
updates = jax.random.normal(jax.random.key(0), (10, 1000))
text = jax.jit(ff.coordinate_median).lower(updates).compile().as_text()
assert "fedfuse.coordinate_median.v1" in text, "the definition runs, not the kernel"
np.testing.assert_array_equal(ff.coordinate_median(updates), np.median(np.asarray(updates), axis=0))
print("probe: right")
PYTHON
}

# pytest on a GPU, without what passed before: run_tests NAME ARGUMENT...
run_tests() {
  local name=$1 side_by_side=() status
  shift
  # Compiling takes most of the time, and every process needs some of the card's memory.
  has_module xdist && side_by_side=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  PYTHONPATH="$ROOT/tools:$PYTHONPATH" JAX_PLATFORMS=cuda,cpu "$PYTHON" -m pytest -q -p no:cacheprovider -p resume \
    --passed "$WORK/passed.txt" "${side_by_side[@]}" "$@" > "$RESULTS/$name.txt" 2>&1
  status=$?
  grep -E '^(FAILED|ERROR)' "$RESULTS/$name.txt" | head -40
  tail -1 "$RESULTS/$name.txt"
  return $((status == 5 ? 0 : status))  # 5: nothing is left to run
}

# Every rule of the contract, for every operation.
stage_battery() {
  skip_without pytest || return 0
  run_tests battery tests/test_battery.py tests/test_export.py tests/test_donation.py
}

# The rest of the suite: the full tier too, but for what runs on a CPU alone.
stage_tests() {
  skip_without pytest || return 0
  local file files=()
  for file in tests/test_*.py; do
    case $(basename "$file") in
      test_bits.py | test_networks.py | test_gpu_session.py | test_cuda_build.py | test_robustness.py) continue ;;
    esac
    # Others say themselves what they lack.
    if grep -q '^import hypothesis\|^from hypothesis' "$file" && ! has_module hypothesis; then
      say "skipped: $file: not installed: hypothesis"
    else
      files+=("$file")
    fi
  done
  run_tests tests "${files[@]}" && run_tests full -m full tests/test_battery.py tests/test_order_statistics.py
}

# A jitted loop of operations of every family, recorded as command buffers and replayed: the same as without.
stage_commands() {
  local flags="--xla_gpu_graph_min_graph_size=1"
  flags+=" --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUSTOM_CALL,WHILE,CONDITIONAL"
  XLA_FLAGS="--xla_gpu_enable_command_buffer=" "$PYTHON" tools/gpu_checks.py loop "$WORK/without.npy" || return 1
  rm -rf "$WORK/dump"
  XLA_FLAGS="$flags --xla_dump_to=$WORK/dump" "$PYTHON" tools/gpu_checks.py loop "$WORK/with.npy" || return 1
  cmp "$WORK/without.npy" "$WORK/with.npy" && echo "command buffers: the same bits"
  local status=$?
  # Whether XLA recorded any, it says in its own words, which differ from release to release; flags are not meant.
  echo "what XLA's dump says of command buffers (if nothing, replay was not shown):"
  grep -rhE 'kCommandBuffer|command_buffer' "$WORK/dump" | grep -v 'xla_gpu\|during_profiling' |
    grep -oE 'kCommandBuffer|command_buffer[_.a-z0-9]*' | sort | uniq -c | sort -rn | head
  return "$status"
}

# Two streams, and several threads.
stage_streams() {
  "$PYTHON" tools/gpu_checks.py streams
}

# Several processes on the card at once.
stage_processes() {
  local number pids=() failed=0
  for number in 1 2 3; do
    "$PYTHON" tools/gpu_checks.py loop "$WORK/process$number.npy" > "$RESULTS/process$number.txt" 2>&1 &
    pids+=($!)
  done
  for number in "${pids[@]}"; do wait "$number" || failed=1; done
  [[ $failed -eq 0 ]] || { tail -n 5 "$RESULTS"/process?.txt; return 1; }
  cmp "$WORK/process1.npy" "$WORK/process2.npy" && cmp "$WORK/process1.npy" "$WORK/process3.npy" &&
    echo "three processes: the same bits"
}

# Every kernel, small, under each tool of compute-sanitizer; and first, which kernels that reaches.
stage_sanitize() {
  local build_log=$WORK/build.log tool failed=0
  if [[ -e $build_log && ! -e $WORK/marks/sanitize.reached ]]; then
    "$PYTHON" tools/gpu_checks.py kernels --log "$build_log" > "$RESULTS/kernels-reached.txt" 2>&1 &&
      touch "$WORK/marks/sanitize.reached"
    grep -vE '^(float|bfloat)' "$RESULTS/kernels-reached.txt" | head -20
  fi
  command -v compute-sanitizer > /dev/null || { say "skipped: not installed: compute-sanitizer"; return 0; }
  for tool in memcheck racecheck initcheck; do
    [[ -e $WORK/marks/sanitize.$tool ]] && continue
    say "sanitize: $tool"
    if compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=fedfuse \
      "$PYTHON" tools/gpu_checks.py kernels > "$RESULTS/sanitize-$tool.txt" 2>&1; then
      touch "$WORK/marks/sanitize.$tool"
    else
      failed=1
    fi
    tail -2 "$RESULTS/sanitize-$tool.txt"
  done
  return "$failed"
}

# benchmarks ARGUMENT...: rows that were measured today are kept.
run_benchmarks() {
  has_module torch || say "without PyTorch's rows: not installed: torch"
  "$PYTHON" -m benchmarks --gpu --resume --patience 5 --output "$WORK/benchmarks" "$@"
  local status=$?
  cp -r "$WORK/benchmarks" "$RESULTS/" 2> /dev/null
  return "$status"
}

# The sizes that figures are known for, with the copy probe in every row: 32 and 128 clients x 100k and 1M parameters
# (of sparse updates, one in a hundred: k = 10k of 1M).
stage_published() {
  [[ -d benchmarks ]] || { say "skipped: the benchmarks are not here"; return 0; }
  local shapes=32x1e5,32x1e6,128x1e5,128x1e6
  local float32=coordinate_median,trimmed_mean,topk_sparse_weighted_sum,fedadam_weighted_update
  run_benchmarks --shapes "$shapes" --operations "$float32" &&
    run_benchmarks --shapes "$shapes" --dtypes float16,bfloat16 --operations weighted_sum
}

stage_benchmarks() {
  [[ -d benchmarks ]] || { say "skipped: the benchmarks are not here"; return 0; }
  run_benchmarks
}

run_stage() {
  local stage=$1 status left=$((CALL_SECONDS - SECONDS))
  [[ $left -gt 20 ]] || { say "stage $stage: no time left; call again to go on"; return 124; }
  say "stage $stage"
  (
    export -f say has_module skip_without target_of_card run_tests run_benchmarks "stage_$stage"
    export ROOT RESULTS WORK PYTHON
    timeout --kill-after=10 "$left" bash -c "set -u; stage_$stage"
  ) 2>&1 | tee "$RESULTS/stage-$stage.txt"
  status=${PIPESTATUS[0]}
  case $status in
    0) touch "$WORK/marks/$stage"; say "stage $stage: done, second $SECONDS" ;;
    124 | 137) say "stage $stage: out of time; call again to go on" ;;
    *) say "stage $stage: FAILED ($status)" ;;
  esac
  return "$status"
}

case ${1:-} in
  --list) printf '%s\n' "${STAGES[@]}"; exit 0 ;;
  --fresh) rm -rf "$WORK"; mkdir -p "$WORK/marks"; shift ;;
esac
failures=0
if [[ $# -gt 0 ]]; then
  for stage in "$@"; do
    [[ " ${STAGES[*]} " == *" $stage "* ]] || { say "there is no stage $stage"; exit 2; }
    rm -f "$WORK/marks/$stage" "$WORK/marks/$stage".*
    run_stage "$stage" || failures=$((failures + 1))
  done
else
  for stage in "${STAGES[@]}"; do
    [[ -e $WORK/marks/$stage ]] && { say "stage $stage: done before"; continue; }
    run_stage "$stage" || failures=$((failures + 1))
    # Nothing below makes sense without a module that loads.
    [[ $stage =~ ^(machine|build|probe)$ && ! -e $WORK/marks/$stage ]] && break
  done
fi
say "$failures stages failed or have work left; results in $RESULTS"
exit $((failures > 0))
