// The CUDA runtime as pyft.h shows it: devices and errors.
#include "device.h"

namespace {
thread_local cudaError_t last_error = cudaSuccess;
}

namespace pyft {

pyft_status launch_status() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return PYFT_OK;
  last_error = error;
  return PYFT_CUDA_ERROR;
}

}  // namespace pyft

extern "C" {

int pyft_cuda_device_count(void) {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  last_error = cudaGetLastError();
  return 0;
}

const char* pyft_cuda_error_string(void) { return cudaGetErrorString(last_error); }

}  // extern "C"
