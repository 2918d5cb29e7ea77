# Decides whether to build the CUDA handlers, and finds what they need. Sets:
#   with_cuda  ON or OFF
#   NVCC       the nvcc, CUDA 12.3 or newer; set as the CUDA compiler
#   FA3        the folder of FlashAttention-3's source
# JAX_MLA_CP_CUDA=1: ON, or the build fails. 0: OFF. Unset: ON where there are a GPU, an nvcc and the source; a warning
# says what is missing where there is a GPU. Needs Python_EXECUTABLE.
string(TOLOWER "$ENV{JAX_MLA_CP_CUDA}" asked)
set(insist OFF)
if(asked MATCHES "^(1|on|yes|true|y|t)$")
  set(insist ON)
  set(with_cuda ON)
elseif(asked MATCHES "^(0|off|no|false|n|f)$")
  set(with_cuda OFF)
elseif(NOT asked STREQUAL "")
  message(FATAL_ERROR "JAX_MLA_CP_CUDA: expected 1 (build the CUDA kernels or fail), 0 (don't) or nothing (build them where "
                      "there is a GPU), got '$ENV{JAX_MLA_CP_CUDA}'.")
elseif(EXISTS /proc/driver/nvidia/version)  # the kernel driver's file: visible in containers too, and without running anything
  set(with_cuda ON)
else()
  set(with_cuda OFF)
endif()

# Reports why CUDA can't be built: fails if it was asked for, otherwise warns and sets with_cuda to OFF.
function(no_cuda reason)
  if(insist)
    message(FATAL_ERROR "JAX_MLA_CP_CUDA=1 asks for the CUDA kernels, but ${reason} Or install without them: "
                        "JAX_MLA_CP_CUDA=0.")
  endif()
  message(NOTICE "jax_mla_cp: WARNING: there is a GPU, but ${reason} Until then the FlashAttention-3 kernels are missing and "
                 "attention runs in XLA: correct, but slower. JAX_MLA_CP_CUDA=1 pip install . builds them or says why not.")
  set(with_cuda OFF PARENT_SCOPE)
endfunction()

if(with_cuda)
  if(NOT "$ENV{CUDACXX}" STREQUAL "")
    find_program(NVCC NAMES "$ENV{CUDACXX}" NO_CACHE)  # the user's choice, and no other
  else()
    find_program(NVCC NAMES nvcc NO_CACHE PATHS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" /usr/local/cuda/bin)
  endif()
  if(NOT NVCC)
    no_cuda("there is no nvcc (looked at CUDACXX='$ENV{CUDACXX}', PATH, CUDA_HOME, CUDA_PATH and /usr/local/cuda). \
Install the CUDA toolkit, 12.3 or newer, or set CUDACXX to its nvcc.")
  endif()
endif()
if(with_cuda)
  execute_process(COMMAND "${NVCC}" --version OUTPUT_VARIABLE nvcc_says ERROR_VARIABLE nvcc_says)
  if(NOT nvcc_says MATCHES "release ([0-9]+\\.[0-9]+)")
    no_cuda("'${NVCC} --version' names no release. Set CUDACXX to the nvcc of a CUDA toolkit, 12.3 or newer.")
  elseif(CMAKE_MATCH_1 VERSION_LESS 12.3)
    no_cuda("${NVCC} is of CUDA ${CMAKE_MATCH_1}; FlashAttention-3 needs 12.3 or newer. Install a newer CUDA toolkit, or \
set CUDACXX to its nvcc.")
  endif()
endif()
if(with_cuda)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/../fetch_fa3.py"
    OUTPUT_VARIABLE FA3 OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_VARIABLE fetch_says ERROR_STRIP_TRAILING_WHITESPACE ECHO_ERROR_VARIABLE RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    string(REGEX REPLACE ".*\n" "" fetch_says "${fetch_says}")  # the last line has the reason
    no_cuda("FlashAttention-3's source is missing. ${fetch_says}")
  endif()
endif()
if(with_cuda)
  include(CheckLanguage)
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # an earlier NOTFOUND would be believed
    set(ENV{CUDACXX} "${NVCC}")
    check_language(CUDA)
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    no_cuda("${NVCC} can't compile an empty program (often a host compiler that is too new for it; the logs are in \
${CMAKE_BINARY_DIR}/CMakeFiles). Set CUDAHOSTCXX to a compiler that it supports.")
  endif()
endif()
