# The CUDA module, with nvcc from CUDACXX, from PATH, or from the PyPI wheels of the Python that builds.
#
# find_package(CUDAToolkit) is of no use here: the wheels lack what it looks for. Nothing is needed but the compiler, CUB,
# whose headers any nvcc finds beside it, and the static runtime, which makes a module that loads on machines without a GPU.

set(FEDFUSE_CUDA_CURE
  "Install the compiler into the Python that builds:\n"
  "  pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*'\n"
  "and build without isolation (pip install --no-build-isolation), or set CUDACXX to the nvcc of a CUDA 13 toolkit.")
string(CONCAT FEDFUSE_CUDA_CURE ${FEDFUSE_CUDA_CURE})

# --- The compiler ------------------------------------------------------------------------------------------------

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(FEDFUSE_NVCC_ON_PATH nvcc NO_CMAKE_PATH NO_CMAKE_SYSTEM_PATH)
  if(FEDFUSE_NVCC_ON_PATH)
    set(CMAKE_CUDA_COMPILER ${FEDFUSE_NVCC_ON_PATH})
  else()
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
        "import importlib.util as u; print(u.find_spec('nvidia').submodule_search_locations[0] + '/cu13/bin/nvcc')"
      OUTPUT_VARIABLE FEDFUSE_NVCC_OF_WHEELS OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(NOT FEDFUSE_NVCC_OF_WHEELS OR NOT EXISTS ${FEDFUSE_NVCC_OF_WHEELS})
      message(FATAL_ERROR "FEDFUSE_CUDA=ON, but there is no nvcc in CUDACXX, on PATH or among Python's packages.\n"
                          "${FEDFUSE_CUDA_CURE}")
    endif()
    set(CMAKE_CUDA_COMPILER ${FEDFUSE_NVCC_OF_WHEELS})
  endif()
endif()

# The wheels have their libraries in lib, where their nvcc does not look.
set(FEDFUSE_NVCC "${CMAKE_CUDA_COMPILER}")
if(NOT FEDFUSE_NVCC)
  set(FEDFUSE_NVCC "$ENV{CUDACXX}")
endif()
get_filename_component(FEDFUSE_CUDA_ROOT "${FEDFUSE_NVCC}" REALPATH)
get_filename_component(FEDFUSE_CUDA_ROOT "${FEDFUSE_CUDA_ROOT}" DIRECTORY)
get_filename_component(FEDFUSE_CUDA_ROOT "${FEDFUSE_CUDA_ROOT}" DIRECTORY)
if(EXISTS ${FEDFUSE_CUDA_ROOT}/lib/libcudart_static.a)
  set(CMAKE_CUDA_FLAGS_INIT "-L${FEDFUSE_CUDA_ROOT}/lib")
endif()

# Machine code for every target; for later GPUs, PTX of the last.
set(CMAKE_CUDA_ARCHITECTURES ${FEDFUSE_CUDA_TARGETS})
list(TRANSFORM CMAKE_CUDA_ARCHITECTURES APPEND -real)
list(GET FEDFUSE_CUDA_TARGETS -1 FEDFUSE_CUDA_LAST_TARGET)
list(APPEND CMAKE_CUDA_ARCHITECTURES ${FEDFUSE_CUDA_LAST_TARGET}-virtual)

set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13.0 OR CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 14)
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} is CUDA ${CMAKE_CUDA_COMPILER_VERSION}; fedfuse-jax needs CUDA 13.\n"
                      "${FEDFUSE_CUDA_CURE}")
elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.1)
  message(WARNING "Building with CUDA ${CMAKE_CUDA_COMPILER_VERSION}: its PTX does not load on 13.0 drivers")
endif()

# --- The module --------------------------------------------------------------------------------------------------

# Networks are most of the compile time: a file for each type lets them be compiled side by side.
add_library(fedfuse_cuda STATIC
  ffi/cuda/distances.cu
  ffi/cuda/linear.cu
  ffi/cuda/networks_bfloat16.cu
  ffi/cuda/networks_float16.cu
  ffi/cuda/networks_float32.cu
  ffi/cuda/networks_float64.cu
  ffi/cuda/order_statistics.cu
  ffi/cuda/private.cu
  ffi/cuda/quantized.cu
  ffi/cuda/reductions.cu
  ffi/cuda/runtime.cu
  ffi/cuda/server.cu
  ffi/cuda/sparse.cu
  ffi/cuda/streaming.cu
  ffi/cuda/weighted_spread.cu)
target_link_libraries(fedfuse_cuda PUBLIC fedfuse_contract)
string(REPLACE ";" " " FEDFUSE_CUDA_TARGETS_TEXT "${FEDFUSE_CUDA_TARGETS}")
set_source_files_properties(ffi/cuda/runtime.cu PROPERTIES COMPILE_DEFINITIONS
  "FEDFUSE_CUDA_TARGETS=\"${FEDFUSE_CUDA_TARGETS_TEXT}\"")
# Kernels call the contract's constexpr functions.
target_compile_options(fedfuse_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
option(FEDFUSE_CUDA_STATISTICS "Print the registers and spills of each kernel, for tools/check_cuda_build.py" OFF)
if(FEDFUSE_CUDA_STATISTICS)
  target_compile_options(fedfuse_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
endif()

if(FEDFUSE_PYTHON)
  fedfuse_add_module(_cuda ffi/cuda/module.cc)
  target_link_libraries(_cuda PRIVATE fedfuse_cuda)
  set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static LINKER_LANGUAGE CXX)
endif()
