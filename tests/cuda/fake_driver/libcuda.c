/* Stands in for the GPU driver where there is none: it accepts what a launch needs and prints what it was handed, so that
 * a test can see that the argument bytes, the dimensions and the stream arrive. FAKE_SIZES: bytes of each kernel argument. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef void* Handle;

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int* version) { *version = 13000; return 0; }
CUresult cuGetErrorString(CUresult error, const char** text) { *text = "the fake driver says no"; return 0; }
CUresult cuGetErrorName(CUresult error, const char** text) { *text = "CUDA_ERROR_FAKE"; return 0; }
CUresult cuDeviceGetCount(int* count) { *count = 1; return 0; }
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) { *value = 227 * 1024; return 0; }
CUresult cuCtxGetCurrent(Handle* context) { *context = (Handle)0x77; return 0; }
CUresult cuCtxGetDevice(int* device) { *device = 0; return 0; }
CUresult cuLibraryLoadData(Handle* library, const void* code, void* a, void* b, unsigned c, void* d, void* e, unsigned f) {
  *library = (Handle)0x100;
  return memcmp(code, "\177ELF", 4) != 0;
}
CUresult cuLibraryUnload(Handle library) { return 0; }
CUresult cuLibraryGetKernel(Handle* kernel, Handle library, const char* name) {
  *kernel = (Handle)0x200;
  printf("kernel %s\n", name);
  return 0;
}
CUresult cuKernelGetAttribute(int* value, int attribute, Handle kernel, int device) { *value = 0; return 0; }
CUresult cuKernelSetAttribute(int attribute, int value, Handle kernel, int device) {
  printf("attribute %d = %d\n", attribute, value);
  return value > 227 * 1024;
}
CUresult cuKernelGetLibrary(Handle* library, Handle kernel) { *library = (Handle)0x100; return 0; }
CUresult cuLibraryGetGlobal(void** address, size_t* bytes, Handle library, const char* name) {
  *address = (void*)0x300;
  *bytes = 8;
  printf("global %s\n", name);
  return 0;
}
CUresult cuMemcpyHtoD(void* to, const void* from, size_t bytes) {
  printf("filled %p with ", to);
  for (size_t b = 0; b < bytes; ++b) printf("%02x", ((const unsigned char*)from)[b]);
  printf("\n");
  return 0;
}
CUresult cuLaunchKernel(Handle kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, Handle stream, void** arguments, void** extra) {
  printf("launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %d\n", kernel, gx, gy, gz, bx, by, bz, shared,
         stream, extra != NULL);
  char sizes[256] = "";
  if (getenv("FAKE_SIZES")) strncpy(sizes, getenv("FAKE_SIZES"), 255);
  int i = 0;
  for (char* size = strtok(sizes, ","); size; size = strtok(NULL, ","), ++i) {
    printf("argument ");
    for (int b = 0; b < atoi(size); ++b) printf("%02x", ((unsigned char*)arguments[i])[b]);
    printf("\n");
  }
  return gx == 13;
}

static CUresult find(const char* name, void** function) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) {
    void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = self ? dlsym(self, name) : NULL;
  }
  return *function ? 0 : 500;
}
CUresult cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) { return find(name, function); }
CUresult cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
  CUresult result = find(name, function);
  if (status) *status = result ? 1 : 0;
  return result;
}
