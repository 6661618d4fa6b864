/* Does for another platform what utils/cuda/cpu/worker.py does for this one: loads a compiled kernel, runs it once, keeps what
 * came out. host LIBRARY REQUEST REPLY. Both files hold 64-bit numbers and raw bytes; see tests/test_cuda_platforms.py. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#include <windows.h>
static void* load(const char* path) { return (void*)LoadLibraryA(path); }
static void* symbol(void* library, const char* name) { return (void*)GetProcAddress((HMODULE)library, name); }
#else
#include <dlfcn.h>
static void* load(const char* path) { return dlopen(path, RTLD_NOW); }
static void* symbol(void* library, const char* name) { return dlsym(library, name); }
#endif

enum { MOST = 16, PROBLEM_BYTES = 176, GUARD = 1 << 16 };

static int64_t number(FILE* file) {
  int64_t value = 0;
  if (fread(&value, 8, 1, file) != 1) exit(3);
  return value;
}

static void put(FILE* file, int64_t value) { fwrite(&value, 8, 1, file); }

int main(int count, char** words) {
  if (count != 4) return 2;
  void* library = load(words[1]);
  FILE *request = fopen(words[2], "rb"), *reply = fopen(words[3], "wb");
  if (!library || !request || !reply) return 4;
  int checked = (int)number(request);
  unsigned grid[3], block[3];
  for (int i = 0; i < 3; ++i) grid[i] = (unsigned)number(request);
  for (int i = 0; i < 3; ++i) block[i] = (unsigned)number(request);
  uint64_t shared = (uint64_t)number(request);
  int n = (int)number(request);
  char *bytes[MOST], *pointer[MOST];
  void* arguments[MOST];
  int64_t size[MOST], is_array[MOST];
  if (checked) {
    ((unsigned (*)(uint32_t*))symbol(library, "cu_open"))(0);
    ((void (*)(unsigned))symbol(library, "cu_begin"))(2);
  }
  for (int i = 0; i < n; ++i) {
    is_array[i] = number(request);
    int64_t element = number(request);
    size[i] = number(request);
    bytes[i] = (char*)calloc(1, (size_t)size[i] + 2 * GUARD + 256);
    bytes[i] = (char*)(((uintptr_t)bytes[i] + GUARD + 255) & ~(uintptr_t)255);
    if (fread(bytes[i], 1, (size_t)size[i], request) != (size_t)size[i]) return 5;
    pointer[i] = bytes[i];
    arguments[i] = is_array[i] ? (void*)&pointer[i] : (void*)bytes[i];
    if (checked && is_array[i])
      ((void (*)(void*, uint64_t, int, int))symbol(library, "cu_add_array"))(
          bytes[i], (uint64_t)size[i], (int)element, 1);
  }
  int (*run)(void*, void**, const unsigned*, const unsigned*, uint64_t, uint64_t, uint64_t, uint64_t) =
      (int (*)(void*, void**, const unsigned*, const unsigned*, uint64_t, uint64_t, uint64_t, uint64_t))symbol(library, "cu_run");
  int problems = run(symbol(library, "cu_entry"), arguments, grid, block, shared, 0, 1, 0);
  put(reply, problems);
  int more = 0;
  fwrite(((void* (*)(int*))symbol(library, "cu_problems"))(&more), PROBLEM_BYTES, (size_t)problems, reply);
  if (checked) {
    uint32_t offsets[4096];
    unsigned places = ((unsigned (*)(uint32_t*))symbol(library, "cu_open"))(offsets);
    put(reply, places);
    fwrite(offsets, 4, places, reply);
  }
  for (int i = 0; i < n; ++i)
    if (is_array[i]) fwrite(bytes[i], 1, (size_t)size[i], reply);
  return fclose(reply) ? 6 : 0;
}
