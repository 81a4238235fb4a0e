/* The functions of a CUDA driver that Triton calls, doing nothing: an H100 with 132 multiprocessors whose kernels take no time. */
#include <stdint.h>

static int handle = 1;
static long launches = 0;

long null_driver_launches(void) { return launches; }

int cuLaunchKernelEx(void *config, void *function, void **parameters, void **extra) { launches++; return 0; }
int cuLaunchKernel(void) { launches++; return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 12: *value = 65536; break;  /* registers of a block */
  case 16: *value = 132; break;    /* multiprocessors */
  case 75: *value = 9; break;      /* compute capability, major */
  case 76: *value = 0; break;      /* and minor */
  case 8: case 97: *value = 232448; break;  /* shared memory of a block */
  default: *value = 32;
  }
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 4 ? 32 : attribute == 0 ? 1024 : 0;  /* registers, threads of a block */
  return 0;
}
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = &handle; return 0; }
int cuCtxGetLimit(uint64_t *size, int limit) { *size = 1024; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &handle; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = &handle; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = &handle; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "the null driver has no errors"; return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { *count = 1; return 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }

#define NOTHING(name) int name(void) { return 0; }
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig)
NOTHING(cuModuleUnload) NOTHING(cuTensorMapEncodeTiled) NOTHING(cuMemcpyDtoHAsync_v2) NOTHING(cuMemAllocAsync) NOTHING(cuMemFreeAsync)
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
