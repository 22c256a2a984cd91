#!/usr/bin/env bash
# Build, test, sanitize and benchmark on a machine with a GPU and without a package index.
#
#   tools/gpu_session.sh            # all stages that are not done yet
#   tools/gpu_session.sh tests      # one stage, again
#   tools/gpu_session.sh --list
#
# Stages resume: one that succeeded leaves a mark and is passed over next time. Each ends within STAGE_SECONDS (540 by
# default); a stage that was cut off goes on where it stopped. Results go to $OUT, or to ./gpu-results. PYTHON names the
# interpreter. What is not installed is skipped, and named.
set -u
cd "$(dirname "$0")/.." || exit
readonly ROOT=$PWD
readonly RESULTS=${OUT:-$ROOT/gpu-results}
readonly WORK=${WORK:-$ROOT/build/gpu-session}  # survives between calls, as results may not
readonly STAGE_SECONDS=${STAGE_SECONDS:-540}
readonly PYTHON=$(command -v "${PYTHON:-python3}")
readonly STAGES=(machine build probe tests commands sanitize benchmarks)
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
  for module in nanobind nanobind_backend scikit_build_core pytest hypothesis fedjax optax sklearn torch matplotlib; do
    has_module "$module" && echo "has $module" || echo "lacks $module"
  done
}

# Both modules for this machine's Python and card alone, put beside the package's sources.
stage_build() {
  local backend=ON generator=()
  has_module nanobind_backend || backend=OFF
  command -v ninja > /dev/null && generator=(-G Ninja)
  cmake -S . -B "$WORK/cmake" "${generator[@]}" -DFEDFUSE_CUDA=ON -DFEDFUSE_CUDA_STATISTICS=ON \
    -DFEDFUSE_CUDA_TARGETS="$(target_of_card)" -DFEDFUSE_NANOBIND_BACKEND=$backend -DPython_EXECUTABLE="$PYTHON" \
    -DSKBUILD_SABI_COMPONENT=Development.SABIModule || return 1
  cmake --build "$WORK/cmake" -j "$(nproc)" > "$RESULTS/build.log" 2>&1 || { tail -40 "$RESULTS/build.log"; return 1; }
  cp "$WORK"/cmake/_cpu*.so "$WORK"/cmake/_cuda*.so fedfuse_jax/
  "$PYTHON" tools/check_cuda_build.py "$RESULTS/build.log" --targets "$(target_of_card)" | tee "$RESULTS/registers.txt"
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

# The suite, file by file, so that a run that is cut off goes on with the next file.
stage_tests() {
  skip_without pytest || return 0
  local file name failed=0
  for file in tests/test_*.py; do
    name=$(basename "$file" .py)
    [[ -e $WORK/marks/tests.$name ]] && continue
    case $name in
      test_fedjax) skip_without fedjax haiku || continue ;;
      test_demo) skip_without fedjax sklearn || continue ;;
    esac
    if grep -q '^import hypothesis\|^from hypothesis' "$file" && ! skip_without hypothesis; then
      say "skipped: $name"
      continue
    fi
    say "tests: $name"
    JAX_PLATFORMS=cuda,cpu "$PYTHON" -m pytest -q -p no:cacheprovider -o addopts= "$file" > "$RESULTS/$name.txt" 2>&1
    case $? in
      0 | 5) touch "$WORK/marks/tests.$name" ;;
      *) failed=1 ;;
    esac
    tail -1 "$RESULTS/$name.txt"
  done
  return $failed
}

# A jitted loop of several operations, recorded as a command buffer and replayed: the same as without.
stage_commands() {
  cat > "$WORK/commands.py" << 'PYTHON'
import sys

import jax, jax.numpy as jnp, numpy as np
import fedfuse_jax as ff


def step(total, i, updates, weights):
    where = ff.finite_clients(updates)
    median = ff.coordinate_median(updates + i, where=where)
    mean = ff.trimmed_mean(updates * median, trim_count=i % 3)
    norms = ff.squared_norms(updates - mean)
    return ff.accumulate_weighted(total, ff.weighted_mean(updates, weights / (1 + norms)), 0.5)


updates = jax.random.normal(jax.random.key(0), (20, 10007))
weights = jnp.arange(20.0)
run = jax.jit(lambda u, w: jax.lax.fori_loop(0, 50, lambda i, t: step(t, i, u, w), jnp.zeros(u.shape[1])))
first = np.asarray(run(updates, weights))
for _ in range(3):
    np.testing.assert_array_equal(run(updates, weights), first)
np.save(sys.argv[1], first)
PYTHON
  local flags="--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUSTOM_CALL,WHILE,CONDITIONAL --xla_gpu_graph_min_graph_size=1"
  XLA_FLAGS="--xla_gpu_enable_command_buffer=" "$PYTHON" "$WORK/commands.py" "$WORK/without.npy" || return 1
  XLA_FLAGS="$flags" "$PYTHON" "$WORK/commands.py" "$WORK/with.npy" || return 1
  cmp "$WORK/without.npy" "$WORK/with.npy" && echo "command buffers: the same bits"
}

# Every kernel once, small, under each tool of compute-sanitizer.
stage_sanitize() {
  command -v compute-sanitizer > /dev/null || { say "skipped: not installed: compute-sanitizer"; return 0; }
  cat > "$WORK/sanitize.py" << 'PYTHON'
import jax, jax.numpy as jnp
import fedfuse_jax as ff

jax.config.update("jax_enable_x64", True)
for dtype in ("float32", "bfloat16", "float16", "float64"):
    for n in (1, 2, 3, 5, 9, 10, 15, 20, 24, 31, 40, 47, 63, 75, 90, 110, 127, 200):
        updates = jax.random.normal(jax.random.key(n), (n, 301)).astype(dtype)
        where = jnp.arange(n) % 3 != 1
        for wanted in ({}, {"where": where}):
            jax.grad(lambda u: ff.coordinate_median(u, **wanted).sum())(updates)
            jax.grad(lambda u: ff.trimmed_mean(u, **wanted).sum())(updates)
            jax.grad(lambda u: ff.weighted_mean(u, jnp.ones(n), **wanted).astype("float32").sum())(updates)
            jax.jvp(ff.coordinate_median, (updates,), (updates,))
            ff.squared_norms(updates, **wanted)
        ff.finite_clients(updates)
    tree = {"a": jnp.ones((3, 5), dtype), "b": jnp.ones((3, 40000), dtype)}
    jax.vmap(ff.coordinate_median)(jax.tree.map(lambda x: jnp.stack([x, x]), tree))
    one = jax.tree.map(lambda x: x[0], tree)
    stacked = ff.stack_clients([one, one, one])
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, "float64" if dtype == "float64" else "float32"), one)
    jax.block_until_ready((stacked, ff.accumulate_weighted(zero, one, 0.5)))
PYTHON
  local tool failed=0
  for tool in memcheck racecheck initcheck; do
    [[ -e $WORK/marks/sanitize.$tool ]] && continue
    say "sanitize: $tool"
    if compute-sanitizer --tool $tool --error-exitcode 9 --kernel-regex kns=fedfuse "$PYTHON" "$WORK/sanitize.py" \
      > "$RESULTS/sanitize-$tool.txt" 2>&1; then
      touch "$WORK/marks/sanitize.$tool"
    else
      failed=1
    fi
    tail -2 "$RESULTS/sanitize-$tool.txt"
  done
  return $failed
}

stage_benchmarks() {
  [[ -d benchmarks ]] || { say "skipped: the benchmarks are not here"; return 0; }
  has_module torch || say "without PyTorch's rows: not installed: torch"
  local resume=()
  "$PYTHON" -m benchmarks --help | grep -q -- --resume && resume=(--resume)
  "$PYTHON" -m benchmarks --gpu --output "$WORK/benchmarks" "${resume[@]}"
  local status=$?
  cp -r "$WORK/benchmarks" "$RESULTS/" 2> /dev/null
  return $status
}

run_stage() {
  local stage=$1 status
  say "stage $stage"
  ( export -f say has_module skip_without target_of_card "stage_$stage"
    export ROOT RESULTS WORK PYTHON
    timeout --kill-after=10 "$STAGE_SECONDS" bash -c "set -u; stage_$stage" ) 2>&1 | tee "$RESULTS/stage-$stage.txt"
  status=${PIPESTATUS[0]}
  case $status in
    0) touch "$WORK/marks/$stage"; say "stage $stage: done" ;;
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
say "$failures stages failed; results in $RESULTS"
exit $((failures > 0))
